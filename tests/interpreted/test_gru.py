"""kernels/gru.py under the interpreter: through the operation and by its launchers, against float64."""

import mmap
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from fastarch.kernels import gru
from fastarch.kernels.gru_bwd import gru_bwd_kernel, gru_bwd_reset_kernel
from fastarch.kernels.gru_fwd import gru_fwd_candidate_kernel, gru_fwd_kernel, gru_fwd_reset_kernel, sigmoid, tanh
from gru_cases import BEFORE, FULL, Case, compare, draw, draw_gradients, op
from torch._subclasses.fake_tensor import FakeTensorMode

from fastarch.routing import Route

# of masked lanes, and of infinities on their way through exponentials
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALGORITHMS = ("cell", "pointwise")
ONE_STEP = Case(1, 3, 21, 30)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
both_resets = pytest.mark.parametrize("reset_after", (True, False), ids=("after", "before"))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, request):
    """Tiles so small that small shapes have two, of which the last is not full."""
    if "tiles_as_they_are" not in request.fixturenames:
        small = {key: tile._replace(h=64, n=32, k=32) for key, tile in gru.TILES.items()}
        monkeypatch.setattr(gru, "TILES", small)


@pytest.fixture
def tiles_as_they_are():
    pass


@pytest.fixture
def ours(monkeypatch):
    """The operation with these launchers behind it, as it calls them on CUDA."""

    def of(algorithm):
        monkeypatch.setattr(op, "fwd", gru.gru_fwd)
        monkeypatch.setattr(op, "bwd", gru.gru_bwd)
        monkeypatch.setattr(op, "route", lambda *_: Route(algorithm, "for this test"))
        return op.gru

    return of


@pytest.fixture
def tf32(request):
    """Sets whether float32 products may round their operands."""
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    request.addfinalizer(lambda: setattr(rnn, "fp32_precision", before))
    return lambda allowed: setattr(rnn, "fp32_precision", "tf32" if allowed else "ieee")


def forward(drawn, case, algorithm, save_gates=True):
    return gru.gru_fwd(*drawn.values(), case.reverse, case.reset_after, save_gates, algorithm)


def backward(drawn, case, algorithm, grads, saved, wanted=(True,) * 6):
    tensors = [drawn[name] for name in ("input", "h0", "w_ih", "w_hh")]
    options = case.reverse, case.reset_after, algorithm
    return gru.gru_bwd(*grads, *tensors, *saved, drawn["lengths"], *options, wanted)


def both_ways(drawn, case, algorithm, grads):
    """Output, last state and every gradient."""
    output, h_n, gates = forward(drawn, case, algorithm)
    return output, h_n, *backward(drawn, case, algorithm, grads, (output, gates))


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def padding(case, lengths):
    return torch.arange(case.T)[:, None] >= lengths


# of at least 3000 elements, of which `compare` needs two draws, and few programs: each takes the interpreter 12 ms
CASES = [
    Case(2, 33, 20, 49, reverse=True, lengths=True),
    Case(2, 24, 20, 66, lengths=True, reset_after=False, b_hh=False),
    Case(1, 47, 35, 65),
]
MORE = [
    Case(3, 24, 9, 48, b_ih=False, b_hh=False),
    Case(2, 32, 20, 48, reverse=True, lengths=True, reset_after=False, b_ih=False),
    Case(1, 48, 17, 64, reset_after=False, lengths=True),
]


@every_algorithm
@pytest.mark.parametrize(
    ("case", "dtype"), [*product(CASES, DTYPES), *product(MORE, DTYPES[:1])], ids=lambda value: str(value)
)
def test_values_and_gradients(ours, case, dtype, algorithm):
    compare(ours(algorithm), case, dtype)


@pytest.mark.parametrize("kind", ("half", "tf32", "ieee"))
@pytest.mark.parametrize("supply", ("vectors", "odd"))
def test_every_tile_of_the_table(ours, supply, kind, tf32, monkeypatch, tiles_as_they_are):
    """The tiles as they are, and no others at hand: a wrong choice is a KeyError."""
    these = {key: tile for key, tile in gru.TILES.items() if key[0] == "gates" or key[1:] == (kind, supply)}
    monkeypatch.setattr(gru, "TILES", these)
    tf32(kind == "tf32")
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    C, H = (16, 64) if supply == "vectors" else (17, 63)
    compare(ours("cell"), Case(2, 24, C, H), dtype)


VIEWS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.stack((t, t), -1).flatten(-2)[..., ::2],
    "expanded": lambda t: t[..., :1].expand_as(t),
}


@every_algorithm
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("case", (ONE_STEP, BEFORE._replace(T=2)), ids=str)
def test_any_strides(case, view, algorithm):
    drawn, (dy, dh_n) = draw(case, torch.float32), draw_gradients(case, torch.float32)
    strided = {name: view(t) if t is not None and t.dim() > 1 else t for name, t in drawn.items()}
    grads = view(dy), view(dh_n)
    alike = {name: t if t is None else t.contiguous() for name, t in strided.items()}
    got = both_ways(strided, case, algorithm, grads)
    for ours, want in zip(got, both_ways(alike, case, algorithm, [g.contiguous() for g in grads])):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)  # a library may sum another layout otherwise


@pytest.mark.usefixtures("products_row_by_row")
@every_algorithm
@both_resets
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_padding_counts_for_nothing(dtype, reset_after, algorithm):
    case = FULL._replace(T=3, H=7, reset_after=reset_after)
    drawn, (dy, dh_n) = draw(case, dtype), draw_gradients(case, dtype)
    want = both_ways(drawn, case, algorithm, (dy, dh_n))
    dead = padding(case, drawn["lengths"])
    assert dead.any() and not dead.all()
    assert not want[0][dead].any() and not want[2][dead].any()  # output and dx
    drawn["input"][dead] = dy[dead] = torch.nan
    assert_same(both_ways(drawn, case, algorithm, (dy, dh_n)), want)


@every_algorithm
def test_lengths_out_of_range_count_as_none_or_all(algorithm):
    case = FULL._replace(T=3)
    drawn, grads = draw(case, torch.float32), draw_gradients(case, torch.float32)
    within, beyond = (drawn | {"lengths": torch.tensor(lengths)} for lengths in ([3, 0, 2, 3, 0], [9, -4, 2, 3, 0]))
    assert_same(*(both_ways(some, case, algorithm, grads) for some in (within, beyond)))


@every_algorithm
@both_resets
def test_a_gradient_that_is_none_is_0(reset_after, algorithm):
    case = FULL._replace(T=2, reset_after=reset_after)
    drawn, grads = draw(case, torch.float32), draw_gradients(case, torch.float32)
    output, _, gates = forward(drawn, case, algorithm)
    for given in ((True, False), (False, True)):
        some = [g if give else None for g, give in zip(grads, given)]
        zeros = [g if give else torch.zeros_like(g) for g, give in zip(grads, given)]
        got, want = (backward(drawn, case, algorithm, each, (output, gates)) for each in (some, zeros))
        assert_same(got, want)


@every_algorithm
@both_resets
def test_each_gradient_wanted_or_not(reset_after, algorithm):
    case = Case(2, 3, 5, 4, reset_after=reset_after, lengths=True)
    drawn, grads = draw(case, torch.bfloat16), draw_gradients(case, torch.bfloat16)
    output, _, gates = forward(drawn, case, algorithm)
    together = backward(drawn, case, algorithm, grads, (output, gates))
    for chosen in (0, 2, 3, 5, None):
        wanted = [chosen != i if chosen in (0, 3) else chosen == i for i in range(6)]
        for got, all_of_them, want in zip(
            backward(drawn, case, algorithm, grads, (output, gates), wanted), together, wanted
        ):
            assert_same(got, all_of_them if want else all_of_them.new_empty(0))


@every_algorithm
@both_resets
@pytest.mark.parametrize("T", (1, 2))
def test_results_are_laid_out_as_the_fakes_say(T, reset_after, algorithm):
    case = Case(T, 3, 5, 4, reset_after=reset_after)
    drawn, grads = draw(case, torch.bfloat16), draw_gradients(case, torch.bfloat16)
    drawn["input"] = VIEWS["transposed"](drawn["input"])

    def same(got, want):
        for t, other in zip(got, want, strict=True):
            assert (t.shape, t.stride(), t.dtype) == (other.shape, other.stride(), other.dtype)

    with FakeTensorMode() as mode:
        fakes = {name: t if t is None else mode.from_tensor(t) for name, t in drawn.items()}
    for save_gates in (False, True):
        results = forward(drawn, case, algorithm, save_gates)
        with mode:
            same(results, op.fake_fwd(*fakes.values(), case.reverse, reset_after, save_gates, algorithm))
    output, _, gates = results
    for wanted in ((True,) * 6, (False,) * 6):
        got = backward(drawn, case, algorithm, grads, (output, gates), wanted)
        with mode:
            same(got, op.fake_bwd(*map(mode.from_tensor, grads), *list(fakes.values())[:4], wanted))
    assert len({t.untyped_storage().data_ptr() for t in backward(drawn, case, algorithm, grads, (output, gates))}) == 6


@every_algorithm
@both_resets
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_same_bits_again_and_without_gates(dtype, reset_after, algorithm):
    case = FULL._replace(T=2, reset_after=reset_after)
    drawn, grads = draw(case, dtype), draw_gradients(case, dtype)
    first = both_ways(drawn, case, algorithm, grads)
    assert_same(both_ways(drawn, case, algorithm, grads), first)
    assert_same(forward(drawn, case, algorithm, save_gates=False)[:2], first[:2])


@triton.jit
def activations_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0)
    tl.store(y + at, sigmoid(value), mask=at < n)
    tl.store(y + n + at, tanh(value), mask=at < n)


def test_sigmoid_and_tanh_over_the_whole_range():
    powers = 2.0 ** torch.linspace(-126, 127, 5000, dtype=torch.float64)
    middle = torch.linspace(0, 20, 3000, dtype=torch.float64)
    x = torch.cat((powers, middle, torch.tensor([0.625, torch.inf]))).float()
    x = torch.cat((x, -x, torch.tensor([0.0, -0.0, torch.nan])))
    y = torch.empty(2, len(x))
    activations_kernel[(1,)](x, y, len(x), triton.next_power_of_2(len(x)))
    for got, want in zip(y, (x.double().sigmoid(), x.double().tanh())):
        normal = want.abs() >= torch.finfo(torch.float32).tiny
        torch.testing.assert_close(got.double()[normal], want[normal], rtol=2 * 2.0**-22, atol=0)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6, equal_nan=True)


def far(rows, columns):
    """Zeros of bfloat16, more than 2^31 of them. Untouched memory is free."""
    size = 2 * rows * columns
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.bfloat16).view(rows, columns)


@both_resets
def test_offsets_past_31_bits(reset_after):
    """The kernels at an early step, and at one so late that all tensors over the steps have 2^31 elements before it."""
    N, H, G = 3, 5, 4 if reset_after else 3
    late = 2**31 // (N * H) + 5
    w, b, h = torch.randn(3 * H, H).bfloat16(), torch.randn(3 * H).bfloat16(), torch.randn(N, H).bfloat16()
    rows = {"projected": 3 * H, "gates": G * H, "output": H, "grads": G * H, "before": H, "reset": H, "dy": H}
    drawn = {name: torch.randn(3 * N, columns).bfloat16() for name, columns in rows.items()}
    grid, constants = gru.launch_of("fwd", True, h, (H,), N, H)
    results = []
    near = {name: torch.zeros_like(t) for name, t in drawn.items()}
    for t, of in ((1, near), (late, {name: far((late + 2) * N, columns) for name, columns in rows.items()})):
        for name in rows:
            of[name][(t - 1) * N : (t + 2) * N] = drawn[name]
        h_next, state, update, r_h = torch.empty_like(h), h.float(), torch.empty(N, H), torch.empty_like(h)
        inputs, sizes = (None, None, b, of["projected"], h, state, w, b, None), (t, N, 1, H, 0, 0, 3 * H)
        if reset_after:
            gru_fwd_kernel[grid](*inputs, None, h_next, of["output"], of["gates"], *sizes, **constants)
        else:
            gru_fwd_reset_kernel[grid](*inputs, r_h, update, of["gates"], *sizes, **constants)
            gru_fwd_candidate_kernel[grid](
                *inputs, r_h, update, None, h_next, of["output"], of["gates"], *sizes, **constants
            )
        carry, saved = torch.ones(N, H), (h, of["output"], of["gates"], None)
        back = dict(REVERSE=False, **constants)
        gru_bwd_kernel[grid](
            of["dy"], carry, of["grads"], w, None, *saved, of["before"],
            t, t + 2, N, H, N * H, H, 1, 1, H,
            RESET_AFTER=reset_after, **back,
        )  # fmt: skip
        if not reset_after:
            gru_bwd_reset_kernel[grid](
                carry, of["grads"], w, None, *saved, of["reset"], t, t + 2, N, H, 1, H, **back
            )  # fmt: skip
        results.append([h_next, carry, *(of[name][(t - 1) * N : (t + 2) * N].clone() for name in rows)])
    assert_same(*results)
    assert not torch.equal(results[0][4], drawn["output"])


def test_the_launch_does_not_depend_on_the_steps_or_the_batch(tiles_as_they_are):
    """As Triton would compile again for others."""
    for multiplies, H in product((False, True), (1, 65, 256)):
        options = [gru.launch_of("fwd", multiplies, torch.empty(0), (H,), N, H)[1] for N in (1, 16, 10**6)]
        assert options[0] == options[1] == options[2]
    for kernel in (
        gru_fwd_kernel,
        gru_fwd_reset_kernel,
        gru_fwd_candidate_kernel,
        gru_bwd_kernel,
        gru_bwd_reset_kernel,
    ):
        assert {"t", "N"} <= {*kernel.kwargs["do_not_specialize"]}


def test_products_follow_the_recurrent_layers_setting(tf32, monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    for allowed, name in ((True, "tf32"), (False, "ieee")):
        tf32(allowed)
        assert gru.precision() == name
        with gru.library_precision():
            assert matmul.fp32_precision == name
        assert matmul.fp32_precision == before


def test_an_unknown_algorithm_is_refused():
    drawn, grads = draw(ONE_STEP, torch.float32), draw_gradients(ONE_STEP, torch.float32)
    with pytest.raises(ValueError, match="persistent"):
        both_ways(drawn, ONE_STEP, "persistent", grads)
