"""attn_implementation="fastarch" in transformers' models: outputs, gradients and tokens of "eager", in float64."""

import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastarch import extension, routing

transformers = pytest.importorskip("transformers", reason="the integration is into it")

from fastarch.integrations.transformers import attention, register, takes_boolean_masks  # noqa: E402

N, L, VOCABULARY = 3, 9, 31
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW = {"sliding_window": 4}  # shorter than the sequence
BERT = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
GEMMA2 = {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 24, "n_layer": 2, "n_head": 6}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 6}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
T5 = {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 6}
T5 |= {"dropout_rate": 0.0}
WHISPER = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "num_mel_bins": 5,
    "max_source_positions": L,
    "max_target_positions": 64,
}
WHISPER |= {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in {"layers": 2, "ffn_dim": 32}.items()}
WHISPER |= {f"{part}_attention_heads": 6 for part in ("encoder", "decoder")}
START = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "batched_mm"}
PLAIN = {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
TURNS = {"layer_types": ["sliding_attention", "full_attention"]}


class Case(NamedTuple):
    """A model's class, its config's, what the config is told, and who is padded: None, "left" or "right"."""

    model: str
    config: str
    options: dict
    padding: str | None


CASES = {
    "llama": Case("LlamaForCausalLM", "LlamaConfig", SIZES, None),
    "llama, padded": Case("LlamaForCausalLM", "LlamaConfig", SIZES, "left"),
    "gpt2": Case("GPT2LMHeadModel", "GPT2Config", GPT2 | {"eos_token_id": None, "bos_token_id": None}, "left"),
    "bert": Case("BertModel", "BertConfig", BERT, None),
    "bert, padded": Case("BertModel", "BertConfig", BERT, "right"),
    "mistral, window": Case("MistralForCausalLM", "MistralConfig", SIZES | WINDOW, None),
    "mistral, window, padded": Case("MistralForCausalLM", "MistralConfig", SIZES | WINDOW, "left"),
    "gemma2, softcap, windows by turns": Case("Gemma2ForCausalLM", "Gemma2Config", SIZES | WINDOW | GEMMA2, "left"),
    "gpt_oss, sinks": Case("GptOssForCausalLM", "GptOssConfig", SIZES | WINDOW | EXPERTS | TURNS | PLAIN, "left"),
    "vit": Case("ViTModel", "ViTConfig", ENCODER | {"image_size": 12, "patch_size": 4}, None),
    "t5, position bias": Case("T5ForConditionalGeneration", "T5Config", T5 | START, "right"),
    "whisper": Case("WhisperForConditionalGeneration", "WhisperConfig", WHISPER | START, None),
    "splinter": Case("SplinterModel", "SplinterConfig", BERT, None),
    "bloom": Case("BloomForCausalLM", "BloomConfig", BLOOM, "left"),
}
UNSERVED = [CASES["bloom"]]  # which asks for nobody's attention
GENERATING = [
    "llama",
    "llama, padded",
    "gpt2",
    "mistral, window",
    "mistral, window, padded",
    "gemma2, softcap, windows by turns",
    "gpt_oss, sinks",
    "t5, position bias",
]


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # too little for two


@pytest.fixture(autouse=True)
def exact_softmax(monkeypatch):
    """Eager's is in float32, where the lowest number of float64 is -inf and a row of padding NaN."""
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda x, dim=None, dtype=None, **_: softmax(x, dim))


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@torch.no_grad()
def build(case: Case, **options) -> tuple[nn.Module, nn.Module]:
    """Ours and eager's, of the same weights, of which none is 0 or 1."""

    def model(attn_implementation: str) -> nn.Module:
        config = getattr(transformers, case.config)(**case.options, **options, attn_implementation=attn_implementation)
        return getattr(transformers, case.model)(config).double().eval()

    ours, eager = model("fastarch"), model("eager")
    for parameter in eager.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    ours.load_state_dict(eager.state_dict())
    return ours, eager


def padding_of(case: Case, length: int = L) -> Tensor | None:
    """[N, length], 1 where tokens are."""
    if case.padding is None:
        return None
    lengths = torch.tensor([length, length - 5, length - 2])
    mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
    return mask.flip(1) if case.padding == "left" else mask


def inputs_of(case: Case, length: int = L) -> dict[str, Tensor]:
    if case.model.startswith("ViT"):
        return {"pixel_values": torch.randn(N, 3, 12, 12, dtype=torch.float64)}
    tokens = {"input_ids": torch.randint(1, VOCABULARY, (N, length))}
    if case.model.startswith("Whisper"):
        tokens = {"input_features": torch.randn(N, 5, 2 * length, dtype=torch.float64)}
    mask = padding_of(case, length)
    return tokens if mask is None else tokens | {"attention_mask": mask}


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits or states, and 0 at padding, where eager attends to everything alike and we to nothing."""
    if model.config.is_encoder_decoder:
        inputs = inputs | {"decoder_input_ids": torch.arange(4).expand(N, 4) + 1}
    outputs = model(**inputs)
    output = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    mask = inputs.get("attention_mask")
    if mask is None or model.config.is_encoder_decoder:
        return output
    return output * mask.unsqueeze(2)


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and the gradients of its sum with random weights."""
    output = output_of(model, inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((output * weights).sum(), list(parameters.values()), allow_unused=True)
    return {"output": output.detach()} | {key: t for key, t in zip(parameters, grads) if t is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """But for the float32 that some norms and rotations compute in."""
    assert got.keys() == want.keys()
    for key in want:
        assert (got[key] - want[key]).norm() <= 1e-5 * want[key].norm() + 1e-9, key


def calls_of(case: Case) -> int:
    """Two layers of attention; an encoder's, a decoder's and the decoder's to the encoder."""
    return 0 if case in UNSERVED else 6 if case.model.endswith("Generation") else 2


def test_outputs_and_gradients_are_those_of_eager(case):
    ours, eager = (model.train() for model in build(case))
    inputs = inputs_of(case)
    with routing.recording() as calls:
        got = gradients(ours, inputs)
    assert_same(got, gradients(eager, inputs))
    assert len(calls) == calls_of(case)
    if extension.cpu is not None:
        assert all(call.backend == f"cpu-{extension.isa} flash" for call in calls)


def test_the_loss_and_its_gradients_are_those_of_eager():
    """Padding has no label."""
    case = CASES["llama, padded"]
    models, inputs = build(case), inputs_of(case)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)  # on the right, where nothing is asked of it
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    results = []
    for model in models:
        model.train()(**inputs, labels=labels).loss.backward()
        results.append({key: p.grad for key, p in model.named_parameters()})
    assert_same(*results)


def test_keys_are_not_repeated_for_grouped_heads():
    ours, _ = build(CASES["llama"])
    with routing.recording() as calls:
        ours(**inputs_of(CASES["llama"]))
    assert [(call.shapes["query"][1], call.shapes["key"][1]) for call in calls] == [(6, 2)] * 2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("case", [CASES[name] for name in GENERATING], ids=GENERATING)
def test_generates_the_tokens_of_eager(case, cache):
    """Beyond the window, too."""
    models, inputs = build(case), inputs_of(case)
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "cache_implementation": cache}
    got, want = (model.generate(**inputs, **options) for model in models)
    assert torch.equal(got, want)
    assert len(want[0].unique()) > 2


def test_a_single_query_is_split_over_keys():
    ours, _ = build(CASES["llama"])
    options = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
    with routing.recording() as calls:
        ours.generate(**inputs_of(CASES["llama"]), **options)
    prompt, steps = calls[:2], calls[2:]
    assert {call.operation for call in prompt} == {"scaled_dot_product_attention"}
    assert [call.operation for call in steps] == ["attention_decode"] * 4
    assert [call.shapes["key"][2] for call in steps] == [L + 1, L + 1, L + 2, L + 2]


@pytest.mark.parametrize("name", ["llama, padded", "mistral, window", "gemma2, softcap, windows by turns"])
def test_a_prompt_may_come_in_parts(name):
    """Several queries behind a cache that is not empty."""
    case = CASES[name]
    models, inputs = build(case), inputs_of(case, 12)
    results = []
    for model in models:
        cache, outputs = None, []
        for start, end in ((0, 5), (5, 9), (9, 12)):
            part = {"input_ids": inputs["input_ids"][:, start:end]}
            if case.padding:
                mask = inputs["attention_mask"][:, :end]
                part |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(0)[:, start:]}
            returned = model(**part, cache=cache, use_cache=True)
            cache = returned.cache
            outputs.append(returned.logits)
        keep = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        results.append({"logits": torch.cat(outputs, 1) * keep.unsqueeze(2)})
    assert_same(*results)


def test_packed_sequences_are_kept_apart():
    """transformers reads them off position_ids that begin anew."""
    case = CASES["llama"]
    ours, eager = build(case)
    tokens = torch.randint(VOCABULARY, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    got, want = (model(tokens, position_ids=positions, use_cache=False).logits for model in (ours, eager))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[:, 4:7], ours(tokens[:, 4:7]).logits, rtol=1e-5, atol=1e-5)


def test_a_mask_of_the_users_is_taken_as_it_is():
    ours, eager = build(CASES["llama"])
    tokens = inputs_of(CASES["llama"])["input_ids"]
    sees = (torch.rand(N, 1, L, L) < 0.5) | torch.eye(L, dtype=torch.bool)
    added = torch.zeros(N, 1, L, L, dtype=torch.float64).masked_fill(~sees, torch.finfo(torch.float64).min)
    want = eager(tokens, attention_mask=added).logits
    for mask in (sees, added):
        torch.testing.assert_close(ours(tokens, attention_mask=mask).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [1, L])
def test_dropout_drops_weights(queries):
    q, k = torch.randn(N, 6, queries, 4), torch.randn(N, 6, 64, 4)
    output, _ = attention(nn.Module(), q, k, torch.ones(N, 6, 64, 1), None, dropout=0.25)
    assert output.std() > 0.03
    assert output.mean().item() == pytest.approx(1, abs=0.1)


def test_an_existing_model_is_told():
    ours, eager = build(CASES["llama"])
    inputs, logits = inputs_of(CASES["llama"]), []
    for name in ("fastarch", "eager"):
        eager.set_attn_implementation(name)
        with routing.recording() as calls:
            logits.append(eager(**inputs).logits)
        assert bool(calls) == (name == "fastarch")
    torch.testing.assert_close(*logits)
    assert torch.equal(ours(**inputs).logits, logits[0])


@pytest.mark.parametrize("name", ["llama, padded", "mistral, window", "bert, padded", "gpt_oss, sinks", "bloom"])
def test_compiles_to_one_graph(name):
    torch._dynamo.reset()
    case = CASES[name]
    (ours, _), inputs = build(case), inputs_of(case)
    with routing.recording() as calls:
        got = output_of(torch.compile(ours, fullgraph=True, backend="aot_eager"), inputs)
    assert len(calls) >= calls_of(case)
    torch.testing.assert_close(got, output_of(ours, inputs))


@pytest.mark.parametrize(("name", "takes"), [("llama", True), ("gpt_oss, sinks", True), ("bloom", False)])
def test_only_models_that_read_boolean_masks_get_them(name, takes):
    ours, _ = build(CASES[name])
    assert takes_boolean_masks(type(ours.config)) is takes
    assert not takes_boolean_masks(type(None))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_attention_weights_are_refused(name):
    ours, _ = build(CASES[name])
    with pytest.raises(ValueError, match=r"^fastarch: want output_attentions=False"):
        ours(**inputs_of(CASES[name]), output_attentions=True)


def test_packed_sequences_without_a_mask_are_refused():
    q, ends = torch.randn(1, 6, L, 4), torch.tensor([0, 4, L], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^fastarch: want packed sequences as position_ids"):
        attention(nn.Module(), q, q, q, None, cu_seq_lens_q=ends)
    attention(nn.Module(), q, q, q, None, cu_seq_lens_q=ends[1:])  # one sequence is as good as not packed


def test_sinks_may_be_of_each_token():
    """As inkling2 has them; softmax with one more score, whose value is 0."""
    q, k, v = torch.randn(3, N, 6, L, 4, dtype=torch.float64)
    sinks = torch.randn(N, 6, L, 1, dtype=torch.float64)
    got, _ = attention(nn.Module(), q, k, v, None, sinks=sinks)
    scores = torch.cat([q @ k.mT / 2, sinks], -1)
    torch.testing.assert_close(got, (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2))


def test_continuous_batching_is_refused():
    """By transformers: its cache in pages is for attention of its own."""
    ours, _ = build(CASES["llama"])
    with pytest.raises(ValueError, match="fastarch is not supported for continuous batching"):
        ours.generate_batch([[1, 2, 3]], generation_config=transformers.GenerationConfig(max_new_tokens=2))


def test_runs_in_bfloat16_and_under_autocast():
    ours, eager = (model.float() for model in build(CASES["llama, padded"]))
    inputs = inputs_of(CASES["llama, padded"])
    want = output_of(eager, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(output_of(ours, inputs).float(), want, rtol=0.1, atol=0.1 * want.abs().max().item())
        assert ours.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape == (N, L + 2)
    got = output_of(ours.bfloat16(), inputs)
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1 * want.abs().max().item())


def test_importing_fastarch_does_not_import_transformers():
    code = "import sys, fastarch, fastarch.integrations; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
