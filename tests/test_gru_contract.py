"""gru on CPUs: what PyTorch's users count on beside the values: compilation, memory, routes, errors."""

import pytest
import torch
from gru_cases import (
    BEFORE,
    CASES,
    FULL,
    PLAIN,
    Case,
    arguments_of_bwd,
    arguments_of_fwd,
    draw,
    draw_gradients,
    in_torch,
    op,
    run,
)
from torch._dynamo.backends.common import aot_autograd

import fastarch
from fastarch import extension, routing
from fastarch.ops import gru, gru_cell

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

if extension.cpu is None:
    pytest.skip("fastarch._C is not built", allow_module_level=True)


@pytest.mark.parametrize("case", [PLAIN, FULL, BEFORE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(case, dtype):
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for operation, arguments_of in ((op.fwd, arguments_of_fwd), (op.bwd, arguments_of_bwd)):
        torch.library.opcheck(operation, (), arguments_of(case, dtype), test_utils=tests)
    fwd = arguments_of_fwd(case, dtype) | {"save_gates": False}
    torch.library.opcheck(op.fwd, (), fwd, test_utils=tests)
    torch.library.opcheck(op.bwd, (), arguments_of_bwd(case, dtype) | {"output_mask": [False] * 6}, test_utils=tests)


def test_compile_with_dynamic_shapes():
    torch._dynamo.reset()
    drawn = draw(FULL, torch.float32)
    parameters = {k: drawn[k].requires_grad_() for k in ("w_ih", "w_hh", "b_ih", "b_hh")}
    graphs = []
    keep = lambda graph, _: graphs.append(graph.code) or graph.forward  # noqa: E731

    def function(x, h0, lengths):
        output, h_n = gru(x * 2, h0, **parameters, lengths=lengths, **FULL.options)
        return output * 3, h_n

    compiled = torch.compile(
        function, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T, N in ((4, 5), (7, 3), (9, 11)):
            x, h0 = torch.randn(T, N, FULL.C, requires_grad=True), torch.randn(N, FULL.H, requires_grad=True)
            lengths = torch.randint(1, T + 1, (N,))
            results = []
            for f in (compiled, function):
                output, h_n = f(x, h0, lengths)
                loss = output.square().sum() + h_n.sum()
                results.append((output, h_n, *torch.autograd.grad(loss, (x, h0, *parameters.values()))))
            for got, want in zip(*results):
                torch.testing.assert_close(got, want)
    forward, backward = graphs
    assert "fastarch.gru_fwd" in forward
    assert "fastarch.gru_bwd" in backward, "the compiled backward is the reference's"


def test_autocast_as_a_product():
    """torch casts what goes into a GRU's products, and so do we."""
    drawn, gradients = draw(PLAIN, torch.float32), draw_gradients(PLAIN, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(gru, drawn, gradients, **PLAIN.options)
    half = {name: None if t is None else t.bfloat16() for name, t in drawn.items()}
    outside = run(gru, half, gradients, **PLAIN.options)
    for name in outside:
        wide = torch.float32 if name.startswith("d") else torch.bfloat16
        assert inside[name].dtype == wide, name
        assert torch.equal(inside[name], outside[name].to(wide)), name


@pytest.mark.parametrize("case", [PLAIN, BEFORE], ids=str)
def test_transforms_go_through_the_reference(case):
    drawn = draw(case, torch.float64)
    w = drawn.pop("w_hh")

    def f(w):
        output, h_n = gru(**drawn, w_hh=w, **case.options)
        return output.square().sum() + h_n.sum()

    want = torch.autograd.grad(f(w.requires_grad_()), w)[0]
    w = w.detach()
    torch.testing.assert_close(torch.func.grad(f)(w), want)
    torch.testing.assert_close(torch.func.vmap(f)(torch.stack([w, 2 * w])), torch.stack([f(w), f(2 * w)]))
    _, tangent = torch.func.jvp(f, (w,), (torch.ones_like(w),))
    torch.testing.assert_close(tangent, want.sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(w, torch.ones_like(w))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(f(dual)).tangent, want.sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [PLAIN, PLAIN._replace(reset_after=False)], ids=str)
def test_saved_memory(case, dtype):
    drawn = {name: t if t is None else t.requires_grad_() for name, t in draw(case, dtype).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output, _ = gru(**drawn, **case.options)
    given = sum(t.nbytes for t in drawn.values() if t is not None)
    assert sum(t.nbytes for t in saved) == given + (1 + (4 if case.reset_after else 3)) * output.nbytes


def test_parameters_that_are_updated_before_the_backward_are_an_error():
    """As in torch: what was saved for the backward is guarded against changes in place."""
    drawn = draw(PLAIN, torch.float32)
    drawn["input"].requires_grad_()
    for name in ("input", "w_hh", "h0"):
        output, _ = gru(**drawn, **PLAIN.options)
        with torch.no_grad():
            drawn[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_reference_context_and_routes():
    drawn = draw(PLAIN, torch.float32)
    with routing.recording() as calls:
        got = run(gru, drawn)
        with fastarch.reference():
            want = run(gru, drawn)
        for shape in ((0, 3, 4), (5, 0, 4), (5, 3, 0)):
            x, h0 = torch.randn(shape), torch.randn(shape[1], 6)
            output, h_n = gru(x, h0, torch.randn(18, shape[2]), torch.randn(18, 6))
            assert output.shape == (*shape[:2], 6)
            assert h_n.shape == (shape[1], 6)
        gru_cell(drawn["input"][0], drawn["h0"], *list(drawn.values())[2:6])
        gru(*(t.to("meta") for t in list(drawn.values())[:6]))
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    kernel = f"cpu-{extension.isa} sequence"
    assert [call.backend for call in calls] == [kernel, *["reference"] * 4, kernel, "reference"]
    assert [call.operation for call in calls] == ["gru"] * 5 + ["gru_cell", "gru"]
    reasons = [call.reason for call in calls]
    assert reasons[1] == "inside fastarch.reference()"
    assert reasons[2:5] == ["nothing to compute"] * 3
    assert reasons[6] == "no kernel for meta"


def test_an_empty_batch_has_gradients():
    drawn = draw(Case(5, 3, 4, 6), torch.float32)
    drawn |= {"input": drawn["input"][:, :0], "h0": drawn["h0"][:0]}
    got = run(gru, drawn, (torch.empty(5, 0, 6), torch.empty(0, 6)))
    assert not got["dw_hh"].any()
    assert got["dx"].shape == (5, 0, 4)


X, H0, W_IH, W_HH, B = (torch.randn(shape) for shape in ((5, 3, 4), (3, 6), (18, 4), (18, 6), (18,)))
BAD = [
    (TypeError, "want input as a floating tensor, got list", lambda: gru([1.0], H0, W_IH, W_HH)),
    (TypeError, "want w_hh as a floating tensor, got torch.int64", lambda: gru(X, H0, W_IH, W_HH.long())),
    (TypeError, "want h0 as a floating tensor, got NoneType", lambda: gru(X, None, W_IH, W_HH)),
    (
        TypeError,
        "input is torch.float32 on cpu, h0 is torch.float64 on cpu",
        lambda: gru(X, H0.double(), W_IH, W_HH),
    ),
    (ValueError, r"want input \[T, N, C\], got \[3, 4\]", lambda: gru(X[0], H0, W_IH, W_HH)),
    (ValueError, r"want w_hh \[3H, H\], got \[17, 6\]", lambda: gru(X, H0, W_IH, W_HH[1:])),
    (
        ValueError,
        r"want h0 \[3, 6\] for input \[5, 3, 4\] and w_hh \[18, 6\], got \[1, 6\]",  # which would broadcast
        lambda: gru(X, H0[:1], W_IH, W_HH),
    ),
    (
        ValueError,
        r"want w_ih \[18, 4\] for input \[5, 3, 4\] and w_hh \[18, 6\], got \[18, 3\]",
        lambda: gru(X, H0, W_IH[:, 1:], W_HH),
    ),
    (
        ValueError,
        r"want b_hh \[18\] for input \[5, 3, 4\] and w_hh \[18, 6\], got \[1\]",
        lambda: gru(X, H0, W_IH, W_HH, B, B[:1]),
    ),
    (
        TypeError,
        "want lengths as a tensor of torch.int64 on cpu, got list",
        lambda: gru(X, H0, W_IH, W_HH, lengths=[1, 2, 3]),
    ),
    (
        TypeError,
        "want lengths as a tensor of torch.int64 on cpu, got torch.int32 on cpu",
        lambda: gru(X, H0, W_IH, W_HH, lengths=torch.tensor([1, 2, 3], dtype=torch.int32)),
    ),
    (
        ValueError,
        r"want lengths \[3\] for input \[5, 3, 4\], got \[2\]",
        lambda: gru(X, H0, W_IH, W_HH, lengths=torch.tensor([1, 2])),
    ),
    (
        ValueError,
        "want lengths from 0 to 5, got 1 to 6",
        lambda: gru(X, H0, W_IH, W_HH, lengths=torch.tensor([1, 6, 2])),
    ),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[message for _, message, _ in BAD])
def test_errors_say_what_was_wanted_and_what_came(error, message, call):
    with pytest.raises(error, match=f"^gru: {message}"):
        call()


def test_errors_of_the_cell_name_it():
    with pytest.raises(ValueError, match=r"^gru_cell: want input \[C\] or \[N, C\], got \[5, 3, 4\]"):
        gru_cell(X, H0, W_IH, W_HH)
    with pytest.raises(ValueError, match=r"^gru_cell: want hx \[6\] for input \[4\] and w_hh \[18, 6\], got \[3, 6\]"):
        gru_cell(X[0, 0], H0, W_IH, W_HH)


@pytest.mark.parametrize("case", [FULL, BEFORE, CASES[5]], ids=str)
def test_nonsense_in_direct_calls_of_the_operations_raises(case):
    refused = (ValueError, TypeError, RuntimeError)
    for operation, arguments_of in ((op.fwd, arguments_of_fwd), (op.bwd, arguments_of_bwd)):
        arguments = arguments_of(case, torch.float32)
        for name, t in arguments.items():
            if not isinstance(t, torch.Tensor):
                continue
            wrong = [t[:0], t[..., :-1], t.unsqueeze(0), t.int()]
            wrong += [] if operation is op.fwd and name == "input" else [t[:-1], torch.cat([t, t])]  # other lengths
            wrong += [t.float()] if name == "lengths" else [t.double(), t.bfloat16()]
            for i, bad in enumerate(wrong):
                with pytest.raises(refused):
                    operation(**arguments | {name: bad})
                    pytest.fail(f"{name} {i} of {operation} was taken")
        with pytest.raises(refused):
            operation(**arguments | {"algorithm": "persistent"})


@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_out_of_range_stay_in_bounds(reverse):
    """Under the address sanitizer (make sanitize) this would be caught; here they count as 0 and T."""
    case = FULL._replace(reverse=reverse)
    wild = torch.tensor([case.T, 99, -5, 1 << 62, -(1 << 62)])
    for operation, arguments_of in ((op.fwd, arguments_of_fwd), (op.bwd, arguments_of_bwd)):
        arguments = arguments_of(case, torch.float32)
        results = [operation(**arguments | {"lengths": t}) for t in (wild, wild.clamp(0, case.T))]
        live = torch.arange(case.T).unsqueeze(1) < wild
        for i, (got, want) in enumerate(zip(*results)):
            if operation is op.fwd and i == 2:  # gates, of which padding holds anything
                got, want = got[live], want[live]
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)  # gates of what was padding


def test_in_torch_is_what_torch_computes():
    """The truth itself, against torch.nn.GRU."""
    drawn = draw(PLAIN, torch.float64)
    twin = torch.nn.GRU(PLAIN.C, PLAIN.H).double()
    names = {"weight_ih_l0": "w_ih", "weight_hh_l0": "w_hh", "bias_ih_l0": "b_ih", "bias_hh_l0": "b_hh"}
    twin.load_state_dict({key: drawn[name] for key, name in names.items()})
    output, h_n = twin(drawn["input"], drawn["h0"][None])
    for got, want in zip(in_torch(**drawn), (output, h_n[0])):
        torch.testing.assert_close(got, want)
