"""What torch.fx is told about our layers."""

from torch import nn

ATTRIBUTES = {"__module__": "torch.nn"}


class Leaf(nn.Module):
    """A layer that torch.fx's tracers call whole, as torch.nn's: those they know by the `__module__` that a layer has.

    Its class keeps the true one, by which pickle finds it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__.update(ATTRIBUTES)
