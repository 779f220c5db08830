"""What PyTorch executes: the operations that reach its dispatcher."""

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """The names of what PyTorch executes inside."""

    def __enter__(self) -> list[str]:
        super().__enter__()
        self.names = []
        return self.names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})
