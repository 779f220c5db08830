"""Hugging Face's transformers with our attention.

    from fastarch.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained("...", attn_implementation="fastarch")

transformers asks two functions by that name: one for a mask, once a forward pass, and one for attention, in each layer.
Models that compute their attention themselves (bloom, falcon) ask for none and go on doing so: `fastarch.explain` shows
what was served.
"""

import sys

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask

from fastarch import ops

NAME = "fastarch"


def register() -> None:
    """Make `attn_implementation="fastarch"` known to transformers; once is enough, again does no harm."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


@torch.compiler.assume_constant_result  # the compiler need not see how it is found
def takes_boolean_masks(config: type) -> bool:
    """Whether models of such a config have attention come from transformers' interface and take its masks for SDPA.

    The others add their mask to the scores, and would add True as 1.
    """
    modeling = sys.modules.get(config.__module__.replace("configuration_", "modeling_"))
    if not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        return False
    classes = [c for c in vars(modeling).values() if isinstance(c, type) and issubclass(c, PreTrainedModel)]
    classes = [c for c in classes if c.config_class is config]
    return bool(classes) and all(c._supports_sdpa or c._supports_attention_backend for c in classes)


def mask(*args, config, **options) -> Tensor | None:
    """Of bool [B, 1, Lq, Lk], True to attend, with padding, window and cache in it; None where causality is enough."""
    make = sdpa_mask if takes_boolean_masks(type(config)) else eager_mask
    return make(*args, config=config, **options)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **options,
) -> tuple[Tensor, None]:
    """query [B, Hq, Lq, D], key and value [B, Hkv, Lk, ...], as they come from the cache, to [B, Lq, Hq, Dv].

    Args:
        attention_mask: as `mask` makes it, or one to add. It holds the sliding window, wherever that matters, so the
            layer's `sliding_window` among the options is not applied again.
        is_causal: for attention_mask None; of the module, if None. The keys of several queries then begin where these
            do, and a static cache has more of them, which are empty; a single query is the newest token and sees all.
        position_bias: [1 or B, Hq, Lq, Lk], added to the scores, with a gradient.
        s_aux, sinks: attention sinks [Hq], or [B, Hq, Lq, 1]: one more score that takes part in the softmax and has no
            value.
        options: what else transformers hands to all of its implementations.

    Raises:
        ValueError: attention weights are wanted (gpt2 does not tell and returns none of them), or packed sequences that
            no mask keeps apart.
    """
    refuse(attention_mask, **options)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", None)
    if is_causal is None:  # what the masks of `mask` mean to such a module
        is_causal = takes_boolean_masks(type(getattr(module, "config", None)))
    causal = query.shape[2] > 1 and attention_mask is None and is_causal
    if position_bias is not None:
        attention_mask = biased(position_bias, attention_mask)

    fused = {"scale": scaling, "softcap": softcap or 0.0, "return_lse": True}
    alike = len(query) == len(key) and query.dtype == key.dtype == value.dtype
    if query.shape[2] == 1 and attention_mask is None and not dropout and alike:
        output, lse = ops.attention_decode(query, key, value, **fused)
    else:
        call = (query, key, value, attention_mask, dropout, causal)
        output, lse = ops.scaled_dot_product_attention(*call, enable_gqa=True, **fused)
    if s_aux is not None:
        sinks = s_aux.view(1, -1, 1, 1)
    if sinks is not None:
        rest = (lse.unsqueeze(3) - sinks).sigmoid()  # exp(lse) / (exp(lse) + exp(sinks)), the share of the keys
        output = (output * rest).to(output.dtype)
    return output.transpose(1, 2).contiguous(), None


def biased(position_bias: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype == torch.bool:
        return position_bias.masked_fill(~attention_mask, -torch.inf)
    return position_bias + attention_mask


def refuse(
    attention_mask: Tensor | None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_,
) -> None:
    if output_attentions:
        raise ValueError(f"{NAME}: want output_attentions=False, for the weights are never written, got True")
    if attention_mask is None and cu_seq_lens_q is not None and cu_seq_lens_q.shape[0] > 2:
        raise ValueError(f"{NAME}: want packed sequences as position_ids that begin anew, got only their cu_seq_lens_q")
