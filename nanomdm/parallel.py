"""Many GPUs and machines: one process for each, started by torchrun; copies or shards of a model.

Every function also works where there is one process alone, and then costs nothing.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from .errors import UserError

KINDS = ("auto", "ddp", "fsdp")


@dataclass(frozen=True)
class World:
    """Which of how many processes this one is; `local_rank` counts those of one machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def rows(self, batch_size: int, part: int = 0, parts: int = 1) -> Tensor:
        """The rows of a global batch that this process computes in micro-batch `part`.

        Every so-manieth row, so that each micro-batch has times from all over [0, 1].
        """
        return torch.arange(self.rank + part * self.size, batch_size, self.size * parts)

    def check_batch(self, batch_size: int, parts: int) -> None:
        """Raise `UserError` for a batch that micro-batches and processes do not divide."""
        if batch_size % (parts * self.size):
            times = f" times {self.size} processes" if self.size > 1 else ""
            raise UserError(
                f"training.batch_size={batch_size} is not divisible by training.grad_accum={parts}"
                f"{times}: change one of them"
            )


def world() -> World:
    """As torchrun's environment says; a process by itself without it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    return World(*(int(os.environ[name]) for name in names)) if "RANK" in os.environ else World()


@contextmanager
def processes(device: torch.device, minutes: float = 30):
    """Join the process group that torchrun announces, if it does: NCCL on GPUs, gloo on CPUs.

    A process that waits for another longer than `minutes` raises a `ConnectionError` that, on CPUs,
    names the process that is missing. NCCL ends a process itself; its log says where it waited.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    limit, others = timedelta(minutes=minutes), None
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device, timeout=limit, **meeting(limit))
        else:
            dist.init_process_group("gloo", timeout=limit, **meeting(limit))
            others = dist.new_group(backend="gloo")
        yield
    except RuntimeError as error:
        if "gloo" not in str(error).lower():
            raise
        raise ConnectionError(f"the processes lost each other: {roll_call(others)}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def meeting(limit: timedelta) -> dict:
    """Where and as whom to join a process group.

    torchrun's store still holds the addresses of processes that it has restarted since (PyTorch
    2.13), hence a name for each start. Only one machine can count them: see docs/reliability.md.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": store, "rank": rank, "world_size": size}


def roll_call(group) -> str:
    """Which processes of a `group` of their own do not answer within a few seconds, in words."""
    if group is None:
        return "not all of them were there in time (system.timeout)"
    try:
        dist.monitored_barrier(group, timeout=timedelta(seconds=5), wait_all_ranks=True)
    except RuntimeError as error:
        named = "Rank" in str(error)
        return str(error) if named else "one of them has ended, see torchrun's own line"
    return "all of them answer, see the line of the first that failed"


@contextmanager
def leader_first():
    """The leading process does something before the others, which find it done."""
    if dist.is_initialized() and not world().leads:
        dist.barrier()
    yield
    if dist.is_initialized() and world().leads:
        dist.barrier()


# --- Models -------------------------------------------------------------------------------------


def check_kind(kind: str) -> None:
    """Raise `UserError` for a `system.parallel` that is unknown or cannot be had here."""
    if kind not in KINDS:
        raise UserError(f"system.parallel={kind} is unknown: choose one of {', '.join(KINDS)}")
    if kind != "auto" and "RANK" not in os.environ:
        raise UserError(
            f"system.parallel={kind} is for several processes: start them by torchrun, as in "
            "docs/scaling.md, or say system.parallel=auto"
        )


def distribute(kind: str, model: nn.Module, average: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What to call for a training step; `model` itself where there is one process.

    Copies of it (DDP), whose gradients are averaged, or, for `fsdp`, shards, in place, of it and of
    its moving average.
    """
    if kind == "fsdp":
        shard(average, torch.float32)
        return shard(model, dtype)
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """FSDP2 (arXiv 2304.11277), in place: each process keeps its share of every weight.

    The weights of a block are gathered while it computes, in `dtype`; what is outside the blocks,
    what flows between them and the sums of gradients are float32, as without shards.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here: it takes a second

    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Without a backward pass nothing else would cut the outermost weights again.
    return fully_shard(model, mesh=mesh, reshard_after_forward=None if model.training else True)


def synchronising(model: nn.Module, last: bool):
    """The context of a micro-batch: gradients are averaged after the `last` of a step only."""
    if hasattr(model, "set_requires_gradient_sync"):  # it is sharded
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


# --- Values -------------------------------------------------------------------------------------


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes."""
    if not dist.is_initialized():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def largest(value: int, device: torch.device) -> int:
    """The largest value of any process: all of them get the same answer."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def share_rows(nll: Callable) -> Callable:
    """`nll`, each process computing its share of the rows: the same result on all of them."""
    here = world()
    if here.size == 1:
        return nll

    def shared(model: nn.Module, xt: Tensor, x0: Tensor, is_masked: Tensor) -> Tensor:
        rows = here.rows(len(xt)).to(xt.device)
        read = rows if len(rows) else rows.new_zeros(1)  # all have to call a sharded model
        mine = nll(model, xt[read], x0[read], is_masked[read])
        total = mine.new_zeros(xt.shape).index_copy(0, rows, mine[: len(rows)])
        dist.all_reduce(total)
        return total

    return shared


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered if it is sharded. All processes have to ask for it together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module takes a second to import


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that all processes have whole, cut as `other` of the same shape is."""
    if not is_sharded(other) or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def gather(state, leads: bool):
    """A nested state of dicts and lists with its tensors whole, on the CPU of the leading process.

    One after the other, so that a GPU needs room for one of them. All processes take part.
    """
    if isinstance(state, Tensor):
        tensor = whole(state.detach())
        return tensor.cpu() if leads else None
    if isinstance(state, dict):
        return {key: gather(value, leads) for key, value in state.items()}
    return [gather(v, leads) for v in state] if isinstance(state, list | tuple) else state
