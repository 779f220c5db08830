"""What test_data_parallel.py starts on two ranks."""

import ranks
import torch
from ecosystem_models import batches, twin, written
from ranks import mine
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastarch

SIZE = 6


def synchronised(kind: str) -> nn.Module:
    """The model whose batch norm is of all ranks: written so, or torch.nn's fused."""
    if kind == "written":
        return fastarch.nn.SyncBatchNorm.convert_sync_batchnorm(written())
    return fastarch.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(twin()))


def learn(model: nn.Module, first: int = SIZE, accumulate: bool = False) -> list[Tensor]:
    """The losses of three steps, each rank with its share of every batch."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), []
    dtype = next(model.parameters()).dtype
    for x, label in batches(3, SIZE):
        if first < SIZE:
            x, label = mine(x, first), mine(label, first)
        x = x.to(dtype)
        optimizer.zero_grad()
        if accumulate:  # the same batch twice: one backward that is not exchanged, one that is
            with model.no_sync():
                nn.functional.cross_entropy(model(x), label).backward()
        loss = nn.functional.cross_entropy(model(x), label)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def assert_same(model: dict[str, Tensor], losses: list[Tensor], expected: nn.Module, want: list[Tensor]) -> None:
    """Parameters and statistics, and the mean over the ranks of each loss."""
    losses = torch.stack(losses)
    torch.distributed.all_reduce(losses)
    torch.testing.assert_close(losses / ranks.RANKS, torch.stack(want))
    torch.testing.assert_close(model, dict(expected.state_dict()))


def distributed_data_parallel(kind: str, accumulate: bool = False, **options) -> None:
    model, expected = (DistributedDataParallel(m.double(), **options) for m in (synchronised(kind), twin()))
    losses = learn(model, SIZE // 2, accumulate)
    assert_same(dict(model.module.state_dict()), losses, expected.module, learn(expected, SIZE, accumulate))


def fully_sharded(kind: str, reshard: bool = True) -> None:
    """Parameters in shards on both ranks, layer by layer, gathered when they are needed."""
    model, expected = synchronised(kind).double(), twin().double()
    mesh = init_device_mesh("cpu", (ranks.RANKS,))
    for layer in (model.gru, model.attention, model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    losses = learn(model, SIZE // 2)
    whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in model.state_dict().items()}
    assert_same(whole, losses, expected, learn(expected))


def fully_sharded_in_bfloat16(kind: str) -> None:
    """Shards of float32, arithmetic in bfloat16: learns, and stays near what one process learns in float32."""
    model, mesh = synchronised(kind), init_device_mesh("cpu", (ranks.RANKS,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in (model.gru, model.attention, model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    losses = torch.stack(learn(model, SIZE // 2)).float()
    torch.distributed.all_reduce(losses)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(losses / ranks.RANKS, torch.stack(learn(twin())), rtol=0.05, atol=0.05)


CHECKS = {}
for kind in ("written", "fused"):
    CHECKS |= {
        f"distributed_data_parallel[{kind}]": lambda kind=kind: distributed_data_parallel(kind),
        f"distributed_data_parallel[{kind}-accumulate]": lambda kind=kind: distributed_data_parallel(kind, True),
        f"distributed_data_parallel[{kind}-static]": lambda kind=kind: distributed_data_parallel(
            kind, static_graph=True, gradient_as_bucket_view=True
        ),
        f"fully_sharded[{kind}]": lambda kind=kind: fully_sharded(kind),
        f"fully_sharded[{kind}-kept]": lambda kind=kind: fully_sharded(kind, reshard=False),
        f"fully_sharded_in_bfloat16[{kind}]": lambda kind=kind: fully_sharded_in_bfloat16(kind),
    }

if __name__ == "__main__":
    ranks.run(CHECKS)
