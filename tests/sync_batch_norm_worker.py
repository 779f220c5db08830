"""What test_sync_batch_norm.py starts on two ranks."""

import ranks
import torch
from batch_norm_cases import Case, double, draw, in_torch, run
from closeness import assert_close
from ranks import mine
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastarch
from fastarch import nn
from fastarch.ops import batch_norm

CASES = {
    "planes": Case((8, 5, 7, 6), relu=True),
    "planes_residual": Case((8, 5, 7, 6), residual=True, relu=True),
    "rows": Case((8, 37), relu=True),
    "rows_residual": Case((8, 37), residual=True, relu=True),
    "volumes": Case((8, 3, 4, 5, 2), residual=True),
    "no_affine": Case((8, 4, 9), weight=False, bias=False),
}
SPLITS = {"3_and_5": 3, "1_and_7": 1, "none_and_8": 0, "8_and_none": 8}


def summed(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    dist.all_reduce(t)
    return t


def share(results: dict[str, torch.Tensor], first: int) -> dict[str, torch.Tensor]:
    """Of results for the whole batch, what this rank should have."""
    per_element = {"y", "dx", "dresidual"}
    return {name: mine(t, first) if name in per_element else t for name, t in results.items()}


def equals_one_process(case: Case, first: int, dtype: torch.dtype, channels_last: bool) -> None:
    torch.manual_seed(0)
    whole = draw(case, dtype, channels_last)
    grad_output = torch.randn(case.x).to(dtype)
    eager = run(in_torch, whole, grad_output, **case.options)
    truth = run(in_torch, double(whole), grad_output.double(), **case.options)
    ours = {name: mine(t, first) if name in ("input", "residual") else t for name, t in whole.items()}
    got = run(batch_norm, ours, mine(grad_output, first), **case.options, process_group=dist.group.WORLD)
    got |= {name: summed(got[name]) for name in ("dweight", "dbias") if name in got}
    eager, truth = share(eager, first), share(truth, first)
    assert got.keys() == truth.keys()
    for name in truth:
        assert_close(name, got[name], eager[name], truth[name])


def large_means() -> None:
    """Ranks whose means differ by far more than the standard deviation: the merge must not cancel."""
    torch.manual_seed(0)
    whole = torch.randn(8, 3, 40, 40) + 1e4 * torch.arange(8).view(-1, 1, 1, 1).sub(20)
    running = torch.zeros(3), torch.ones(3)
    batch_norm(mine(whole, 3), *running, training=True, momentum=1.0, process_group=dist.group.WORLD)
    torch.testing.assert_close(running[1].double(), whole.double().var((0, 2, 3)), rtol=1e-6, atol=0)


def second_derivative(case: Case, first: int) -> None:
    torch.manual_seed(0)
    whole = draw(case, torch.float64)
    names = ["input", "weight", "bias"] + (["residual"] if case.residual else [])
    weights = torch.randn(case.x, dtype=torch.float64)

    def seconds(arguments: dict, weights: torch.Tensor, **options) -> dict[str, torch.Tensor]:
        leaves = {name: arguments[name].detach().requires_grad_() for name in names}
        y = batch_norm(**(arguments | leaves), **case.options, **options)
        (dx,) = torch.autograd.grad((y.square() * weights).sum(), leaves["input"], create_graph=True)
        grads = torch.autograd.grad((dx.square() * weights).sum(), list(leaves.values()))
        return {name: grad for name, grad in zip(names, grads)}

    want = seconds(whole, weights)
    ours = {name: mine(t, first) if name in ("input", "residual") else t for name, t in whole.items()}
    got = seconds(ours, mine(weights, first), process_group=dist.group.WORLD)
    for name in names:
        is_parameter = name in ("weight", "bias")
        ours, wanted = (summed(got[name]), want[name]) if is_parameter else (got[name], mine(want[name], first))
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9 * want[name].abs().max().item())


def reference_context() -> None:
    """The reference synchronises as well."""
    case, first = CASES["planes_residual"], 3
    with fastarch.reference():
        equals_one_process(case, first, torch.float64, False)


def pair_of_layers(**options) -> tuple[nn.SyncBatchNorm, nn.BatchNorm2d]:
    torch.manual_seed(0)
    layers = [layer(5, dtype=torch.float64, **options) for layer in (nn.SyncBatchNorm, nn.BatchNorm2d)]
    for parameter in layers[1].parameters():
        torch.nn.init.normal_(parameter)
    layers[0].load_state_dict(layers[1].state_dict())
    return tuple(layers)


def layer(**options) -> None:
    """Three steps of training and one of evaluation, without communication, with one rank's own batch."""
    sync, single = pair_of_layers(**options)
    for first in (3, 5, 0):
        x = torch.randn(8, 5, 4, 3, dtype=torch.float64)
        torch.testing.assert_close(sync(mine(x, first)), mine(single(x), first))
    for name, value in single.state_dict().items():
        torch.testing.assert_close(sync.state_dict()[name], value, msg=lambda m: f"{name}: {m}")  # noqa: B023
    if dist.get_rank() == 0 and single.track_running_stats:  # the other rank would have to join if it communicated
        torch.testing.assert_close(sync.eval()(x), single.eval()(x))


def distributed_data_parallel() -> None:
    """DistributedDataParallel averages gradients over ranks; a converted model learns as one process does."""
    torch.manual_seed(0)
    single = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, activation="relu"), nn.Conv2d(5, 2, 3)).double()
    sync = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, activation="relu"), nn.Conv2d(5, 2, 3)).double()
    sync.load_state_dict(single.state_dict())
    model = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(sync))
    x = torch.randn(8, 3, 9, 9, dtype=torch.float64)
    single(x).square().sum().backward()
    model(mine(x, 3)).square().sum().backward()
    for (name, got), want in zip(model.module.named_parameters(), single.parameters()):
        torch.testing.assert_close(got.grad * dist.get_world_size(), want.grad, msg=lambda m: f"{name}: {m}")  # noqa: B023


def groups() -> None:
    """A layer's own group: alone in it, a rank normalises its own batch."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    x = torch.randn(4, 5, 3, 3) + dist.get_rank()
    layer = nn.SyncBatchNorm(5, process_group=alone)
    torch.testing.assert_close(layer(x), torch.nn.BatchNorm2d(5)(x))


def compiled() -> None:
    """Without graph breaks or recompilation, and the collectives in the graphs."""
    torch._dynamo.reset()
    layers = [pair_of_layers(activation="relu")[0] for _ in range(2)]
    functions = [torch.compile(layers[0], fullgraph=True, dynamic=True), layers[1]]
    for first in (3, 6):
        x, residual = torch.randn(2, 8, 5, 4, 3, dtype=torch.float64)
        results = []
        for function, layer in zip(functions, layers):
            leaves = [mine(t, first).detach().requires_grad_() for t in (x, residual)]
            y = function(*leaves)
            results.append((y, *torch.autograd.grad(y.square().sum(), [*leaves, *layer.parameters()])))
        for got, want in zip(*results):
            torch.testing.assert_close(got, want)
    for name, value in layers[1].state_dict().items():
        torch.testing.assert_close(layers[0].state_dict()[name], value)


CHECKS = {
    f"equals_one_process[{name}-{split}-{str(dtype)[6:]}{'-channels_last' * channels_last}]": (
        lambda case=case, first=first, dtype=dtype, channels_last=channels_last: equals_one_process(
            case, first, dtype, channels_last
        )
    )
    for name, case in CASES.items()
    for split, first in SPLITS.items()
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    for channels_last in (False, True)
    if not channels_last or len(case.x) > 2
}
CHECKS |= {
    f"second_derivative[{name}-{split}]": lambda case=CASES[name], first=first: second_derivative(case, first)
    for name in ("planes", "planes_residual", "rows_residual")
    for split, first in SPLITS.items()
}
CHECKS |= {
    "large_means": large_means,
    "reference_context": reference_context,
    "layer": layer,
    "layer[cumulative]": lambda: layer(momentum=None),
    "layer[plain]": lambda: layer(affine=False),
    "layer[untracked]": lambda: layer(track_running_stats=False),
    "layer[relu]": lambda: layer(activation="relu"),
    "distributed_data_parallel": distributed_data_parallel,
    "groups": groups,
    "compiled": compiled,
}


if __name__ == "__main__":
    ranks.run(CHECKS)
