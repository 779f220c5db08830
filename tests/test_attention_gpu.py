"""attention on a GPU: Triton's kernels against float64, and what only a device shows."""

import itertools
import math

import pytest
import torch
from attention_cases import CASES, DTYPES, FULL, PLAIN, Case, double, draw, in_eager, in_torch, ours, run
from closeness import assert_close

from fastarch import routing
from fastarch.ops import attention_decode, attention_varlen, scaled_dot_product_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

HALF = [torch.bfloat16, torch.float16]
LONG = Case(2, 6, 1025, 1300, 64, Hkv=2, causal=True, lower_right=True)
WIDE = [Case(1, 4, 517, 700, d, mask="float bij", softcap=3.0, dropout=0.2) for d in (128, 256)]


@pytest.fixture(autouse=True)
def exact_products(request):
    """Of float32, in ours and in torch's."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    request.addfinalizer(lambda: setattr(matmul, "fp32_precision", before))
    matmul.fp32_precision = "ieee"


def on_gpu(case: Case, dtype: torch.dtype) -> tuple:
    drawn = {name: None if t is None else t.cuda() for name, t in draw(case, dtype).items()}
    grad_output = torch.randn(case.B, case.H, case.Lq, case.Dv or case.D).to("cuda", dtype)
    return drawn, grad_output, torch.randn(case.B, case.H, case.Lq, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", [*CASES, LONG, *WIDE], ids=str)
def test_values_lse_and_gradients(case, dtype):
    drawn, grad_output, grad_lse = on_gpu(case, dtype)
    got, eager = (run(function, case, drawn, grad_output, grad_lse) for function in (ours, in_eager))
    truth = run(in_torch, case, double(drawn), grad_output.double(), grad_lse.double())
    for name in truth:
        if name == "dmask" and case.mask == "float ":
            continue  # one sum of all scores' gradients, which cancel
        assert_close(name, got[name], eager[name], truth[name])


def test_kernels_serve_every_dtype_but_float64():
    for dtype in DTYPES:
        with routing.recording() as calls:
            run(ours, PLAIN, on_gpu(PLAIN, dtype)[0])
        assert calls[0].backend == ("reference" if dtype == torch.float64 else "triton flash")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [FULL, LONG], ids=str)
def test_bits_do_not_depend_on_the_run(case, dtype):
    drawn, *grads = on_gpu(case, dtype)
    first = run(ours, case, drawn, *grads)
    for _ in range(20):
        for name, t in run(ours, case, drawn, *grads).items():
            assert torch.equal(t, first[name]), name


def test_tf32_rounds_no_more_than_its_operands():
    drawn, *grads = on_gpu(LONG, torch.float32)
    exact = run(ours, LONG, drawn, *grads)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    for name, t in run(ours, LONG, drawn, *grads).items():
        assert (t - exact[name]).norm() <= 5e-3 * exact[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_sequences(dtype):
    lengths = [(5, 9), (0, 3), (300, 270), (7, 0), (133, 120)]
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(ns)], dtype=torch.int32).cuda() for ns in zip(*lengths))
    q, k, v = torch.randn(445, 4, 64), torch.randn(402, 2, 64), torch.randn(402, 2, 64)
    q, k, v = (t.to("cuda", dtype) for t in (q, k, v))
    o = attention_varlen(q, k, v, cu_q, cu_k, 300, 270, is_causal=True)
    for b in range(5):
        one = [t[cu[b] : cu[b + 1]].transpose(0, 1)[None] for t, cu in zip((q, k, v), (cu_q, cu_k, cu_k))]
        want = scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True, causal_alignment="lower_right")
        torch.testing.assert_close(o[cu_q[b] : cu_q[b + 1]], want[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_decode_is_attention_to_the_filled_part(D, dtype):
    q, k, v = (torch.randn(3, H, L, D).to("cuda", dtype) for H, L in ((8, 2), (2, 3000), (2, 3000)))
    filled = torch.tensor([3000, 1, 777], dtype=torch.int32, device="cuda")
    for b, n in enumerate(filled.tolist()):
        k[b, :, n:] = v[b, :, n:] = math.nan
    o = attention_decode(q, k, v, filled)
    for b, n in enumerate(filled.tolist()):
        one = q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n]
        want = scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True, causal_alignment="lower_right")
        torch.testing.assert_close(o[b], want[0])


def test_more_than_2_to_the_31_elements():
    q = torch.randn(1, 1, 2**15 + 70, 128, device="cuda", dtype=torch.bfloat16).expand(1, 520, -1, -1)
    q = q.contiguous()
    assert q.numel() > 2**31
    k, v = torch.randn(2, 1, 1, 100, 128, device="cuda", dtype=torch.bfloat16)
    o = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert torch.equal(o[0, 519], o[0, 0])


def test_a_stream_that_is_not_the_default():
    drawn, *_ = on_gpu(LONG, torch.bfloat16)
    want = run(ours, LONG, drawn)["o"]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        o = run(ours, LONG, drawn | {"query": drawn["query"].clone()})["o"]
    stream.synchronize()
    assert torch.equal(o, want)


def test_cuda_graphs_replay():
    drawn, *grads = on_gpu(LONG, torch.bfloat16)
    step = lambda: run(ours, LONG, drawn, *grads)  # noqa: E731
    want = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for t in got.values():
        t.zero_()
    graph.replay()
    for name, t in got.items():
        assert torch.equal(t, want[name]), name


def test_nothing_waits_for_the_device():
    drawn, *grads = on_gpu(LONG, torch.bfloat16)
    run(ours, LONG, drawn, *grads)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(ours, LONG, drawn, *grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")
