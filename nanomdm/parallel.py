"""Many GPUs and machines: one process for each, started by torchrun; copies or shards of a model.

Every function also works where there is one process alone, and then costs nothing.
"""

import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError

ANSWER = timedelta(seconds=5)  # time that processes have to answer a roll call


class World(NamedTuple):
    """Which of how many processes this one is; `local_rank` counts those of one machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def rows(self, batch_size: int, part: int = 0, parts: int = 1) -> Tensor:
        """The rows of a global batch that this process computes in micro-batch `part`.

        Every (size x parts)-th row, so that each micro-batch has times from all over [0, 1].
        """
        return torch.arange(self.rank + part * self.size, batch_size, self.size * parts)


def world() -> World:
    """As torchrun's environment variables say; without them one process alone."""
    if "RANK" not in os.environ:
        return World()
    return World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


@contextmanager
def processes(device: torch.device, minutes: float = 30):
    """Join the process group that torchrun announces, if it does: NCCL on GPUs, gloo on CPUs.

    A process that waits longer than `minutes` for another raises a `ConnectionError`, which names
    the missing process. NCCL ends the process itself instead; its log says where it waited.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    group = None
    try:
        group = join(device, timedelta(minutes=minutes))
        yield
    except RuntimeError as error:
        if device.type != "cuda":
            roll_call(group, error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def join(device, limit):
    """Join the process group; on CPUs, returns a second one, for the roll call.

    torchrun's store still holds the addresses of processes that it has restarted since (PyTorch
    2.13), so each start gets a prefix. With several machines it cannot: see docs/reliability.md.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    options = {"store": store, "rank": rank, "world_size": size, "timeout": limit}
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)  # both calls want a number
        torch.cuda.set_device(device)
        return dist.init_process_group("nccl", device_id=device, **options)
    dist.init_process_group("gloo", **options)
    return dist.new_group(backend="gloo")


def roll_call(group, error):
    """Raise `ConnectionError` if not all processes of the group answer within `ANSWER`.

    If they do, they have all had the same `error`. Its text is in the line, for it may as well be
    this process alone that failed while the others were computing.
    """
    try:
        dist.monitored_barrier(group, timeout=ANSWER, wait_all_ranks=True)
    except (RuntimeError, ValueError) as missing:  # ValueError: this process has not joined
        raise ConnectionError(f"the processes lost each other: {error}; {missing}") from error


@contextmanager
def main_process_first():
    """The main process runs the block first; the others wait and find it done."""
    here = world()
    if not here.is_main:
        dist.barrier()
    yield
    if here.is_main and here.size > 1:
        dist.barrier()


# --- Models -------------------------------------------------------------------------------------


def distribute(kind: str, model: nn.Module, average: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module to call in a training step; with one process `model` itself.

    DDP averages the gradients of copies. `fsdp` shards the model and its moving average in place.
    Raises `UserError` for a `kind` that one process alone cannot have.
    """
    if not dist.is_initialized():
        if kind != "auto":
            raise UserError(
                f"system.parallel={kind} is for several processes: start them by torchrun, as in "
                "docs/scaling.md, or set system.parallel=auto"
            )
        return model
    if kind == "fsdp":
        shard(average, torch.float32)
        return shard(model, dtype)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.13 renames it
        return nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def shard(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """FSDP2 (arXiv 2304.11277), in place: each process keeps its share of every weight.

    The weights of a block are gathered while it computes, in `dtype`. The layers outside the
    blocks, the residual stream and the sums of gradients are float32, as without shards.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here: it takes a second

    mesh = dist.init_device_mesh(model.device.type, (world().size,))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Without a backward pass nothing else shards the outermost weights again.
    return fully_shard(model, mesh=mesh, reshard_after_forward=None if model.training else True)


def synchronise(model: nn.Module, wanted: bool) -> None:
    """Whether the next forward and backward pass averages the gradients over the processes.

    Of several micro-batches only the last has to.
    """
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(wanted)
    model.require_backward_grad_sync = wanted  # which DDP's no_sync() sets


# --- Values -------------------------------------------------------------------------------------


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes."""
    if not dist.is_initialized():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / world().size


def largest(value: int, device: torch.device) -> int:
    """The largest value of all processes, which all of them get."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(int(value), device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def share_rows(nll: Callable) -> Callable:
    """`nll(xt, targets, where)`, each process computing some of the rows; all get all of them."""
    here = world()
    if here.size == 1:
        return nll

    def shared(xt, targets, where):
        rows = here.rows(len(xt)).to(xt.device)
        read = rows if len(rows) else rows.new_zeros(1)  # every process has to call a sharded model
        mine = nll(xt[read], targets[read], where[read])
        total = mine.new_zeros(xt.shape).index_copy(0, rows, mine[: len(rows)])
        dist.all_reduce(total)
        return total

    return shared


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor, gathered if it is sharded (a DTensor). All processes have to call this together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that every process has in full, sharded as `other` is.

    Raises `ValueError` for another shape.
    """
    if tensor.shape != other.shape:
        raise ValueError(f"a tensor of shape {tensor.shape} in the place of {other.shape}")
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # here: it takes a second

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def gather(state):
    """A nested state of dicts and lists with full tensors, on the CPU of the main process.

    One tensor after the other, so that a GPU needs room for one. All processes take part.
    """
    if isinstance(state, Tensor):
        tensor = full_tensor(state)
        return tensor.cpu() if world().is_main else None
    if isinstance(state, dict):
        return {key: gather(value) for key, value in state.items()}
    return [gather(value) for value in state] if isinstance(state, list | tuple) else state
