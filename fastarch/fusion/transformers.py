"""Models of Hugging Face's transformers, whose attention is the function that their config names."""

import sys
from collections.abc import Iterator
from types import ModuleType

from torch import nn

MARK = "fastarch_attention"  # the attribute of a model that says what its config named before
REPLACED = "sdpa"


def integration() -> ModuleType:
    """Our side of transformers, with our name made known to it. Imported late, for it imports transformers."""
    from fastarch.integrations import transformers

    transformers.register()
    return transformers


class Named:
    """The attention that a config named; a process that unpickles it knows our name as well."""

    def __init__(self, attention: str):
        self.attention = attention

    def __setstate__(self, state: dict):
        self.__dict__.update(state)
        integration()


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
    named = model.config._attn_implementation
    if named != REPLACED:
        return f"its attention is {named}, not {REPLACED}"
    if not model._can_set_attn_implementation() or not integration().takes_boolean_masks(type(model.config)):
        return "it computes its attention itself"
    return None


def change(model: nn.Module) -> None:
    model.__dict__[MARK] = Named(model.config._attn_implementation)
    model.config._attn_implementation_internal = integration().NAME  # the property would change the parts' configs too


def restore(model: nn.Module) -> None:
    """Undo `change`, unless somebody named another since."""
    before = model.__dict__.pop(MARK)
    if model.config._attn_implementation == integration().NAME:
        model.config._attn_implementation_internal = before.attention
