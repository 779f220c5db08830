"""Models of Hugging Face's transformers, whose attention is the function that their config names."""

import sys
from collections.abc import Iterator

from torch import nn

MARK = "fastarch_attention"  # the attribute of a model that says what its config named before
REPLACED = "sdpa"


class Before:
    """What a config named; unpickled, it makes the name that stands there now known to transformers."""

    def __init__(self, attention: str):
        self.attention = attention

    def __setstate__(self, state: dict):
        self.__dict__.update(state)
        register()


def register() -> str:
    from fastarch.integrations import transformers  # here: it imports transformers

    transformers.register()
    return transformers.NAME


def models(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths and models of transformers that know sdpa, one for each config; nothing is imported for them."""
    modeling, seen = sys.modules.get("transformers.modeling_utils"), set()
    if modeling is not None:
        for path, module in root.named_modules():
            known = isinstance(module, modeling.PreTrainedModel) and module._supports_sdpa
            if known and id(module.config) not in seen:
                seen.add(id(module.config))
                yield path, module


def why_left(model: nn.Module) -> str | None:
    """Why the attention of a model stays what it is; None if it may become ours."""
    from fastarch.integrations.transformers import takes_boolean_masks

    named = model.config._attn_implementation
    if named != REPLACED:
        return f"its attention is {named}, not {REPLACED}"
    if not model._can_set_attn_implementation() or not takes_boolean_masks(type(model.config)):
        return "it computes its attention itself"
    if model.config.output_attentions:
        return "it is to return attention weights"
    return None


def change(model: nn.Module) -> None:
    model.__dict__[MARK] = Before(model.config._attn_implementation)
    model.config._attn_implementation_internal = register()  # the property would change the configs of parts as well


def restore(model: nn.Module) -> None:
    """Undo `change`, unless somebody named another since."""
    before = model.__dict__.pop(MARK)
    if model.config._attn_implementation == register():
        model.config._attn_implementation_internal = before.attention
