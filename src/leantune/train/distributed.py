"""Several processes: what they agree on, who writes, and whole tensors of a model that is sharded over them.

``accelerate launch`` or ``torchrun`` starts the processes. The Trainer and accelerate do the rest: gradients averaged
over copies of the model (DDP), or parameters sharded (FSDP2, ZeRO). Here stands what a run needs besides.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

from leantune.core.errors import RunError, describe

# What mpirun tells its processes; the others set WORLD_SIZE.
_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def processes() -> int:
    """How many processes train together, once they have found each other; before, how many were started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Go on when every process is here."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def leave() -> None:
    """The last thing a process of a run does: without it, torch complains at exit."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def sums(values: Sequence[int], device: torch.device) -> list[int]:
    """Counts, added up over all processes."""
    if processes() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return [int(value) for value in total.tolist()]


def largest(value: int, device: torch.device) -> int:
    """The largest value that any process has; the same answer in all."""
    if processes() == 1:
        return value
    found = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def lost_processes() -> str | None:
    """What to tell somebody whose launcher was asked for several processes and started one; None when all is well.

    ``accelerate launch --cpu --num_processes 2`` starts a single process unless mpirun is there.
    """
    asked = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if not asked or any(name in os.environ for name in ("WORLD_SIZE", "LOCAL_RANK", *_MPI)):
        return None
    return (
        "accelerate launch was asked for several processes and started one; on CPUs it takes "
        "--config_file examples/accelerate/ddp_cpu.yaml"
    )


def shard_on_cpu(accelerator: Any) -> None:
    """Let FSDP2 shard over CPU processes when the launcher was asked to.

    accelerate 1.15 knows FSDP of accelerators alone: ``AcceleratorState.__init__`` leaves out ``MULTI_CPU`` and would
    train copies without a word. torch's ``fully_shard`` and accelerate's preparation run over gloo as they are.

    Args:
        accelerator: the ``accelerate.Accelerator`` of a trainer; it prepares models by FSDP2 from here on.

    Raises:
        RunError: FSDP1, which torch does not do on CPUs.
    """
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if not wanted or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise RunError(describe("FSDP", f"version {plugin.fsdp_version} on CPUs", "version 2", "set fsdp_version: 2"))
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def gathered(model: nn.Module, *, everything: bool = False) -> dict[str, Tensor] | None:
    """:func:`whole_state` of a model that is sharded; None for one that every process holds whole."""
    sharded = any(hasattr(each, "full_tensor") or hasattr(each, "ds_id") for each in model.parameters())
    return whole_state(model, everything=everything) if sharded else None


def whole_state(model: nn.Module, *, everything: bool = False) -> dict[str, Tensor]:
    """The state of a sharded model in whole tensors, on the CPU of the main process; every process must call it.

    One tensor at a time is gathered. What is not sharded (the entries of a slice) is passed on.

    Args:
        model: the model, its parameters ``DTensor``s of FSDP2 or partitioned by ZeRO-3.
        everything: also the frozen base, which an adapter's file does not hold.

    Returns:
        Tensors under the names of ``model.state_dict()``; empty in the other processes.
    """
    wanted = None if everything else set(_adapter_names(model))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if wanted is not None and name not in wanted:
            continue
        with _partition_of(parameters.get(name)) as filled:
            whole = value if filled is None else filled
            whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
            if is_main():
                found[name] = whole.detach().to("cpu", copy=True)
    return found


@contextmanager
def _partition_of(parameter: Any) -> Iterator[Tensor | None]:
    """A parameter that DeepSpeed's ZeRO-3 partitions, whole inside the block; None for any other."""
    if not hasattr(parameter, "ds_id"):
        yield None
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield parameter.data


def _adapter_names(model: nn.Module) -> Iterator[str]:
    """What trains, and whatever else the layers of the adapters hold beside the base."""
    prefix = str(getattr(model, "prefix", "") or "")
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    for name in model.state_dict():
        if name in trained or (prefix and any(part.startswith(prefix) for part in name.split("."))):
            yield name
