"""Sharding: FSDP2 over a model's blocks."""

from typing import Any

from torch import nn


def shard(model: nn.Module, mesh: Any) -> None:
    """Apply FSDP2 to each of ``model.blocks`` and to the rest, over the mesh's data-parallel axis; once.

    Args:
        model: Has ``blocks`` and, for generation, ``prefill`` and ``step``.
        mesh: A ``DeviceMesh`` with the axes "data_parallel" and "tensor_parallel", as ``ModelParallelStrategy`` makes.

    Raises:
        ValueError: The tensor-parallel axis is longer than 1.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if isinstance(model, FSDPModule):
        return
    tensor_parallel, data_parallel = mesh["tensor_parallel"].size(), mesh["data_parallel"]
    if tensor_parallel != 1:
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel} is not supported; use 1 and a larger data_parallel_size"
        )
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=data_parallel)
    fully_shard(model, mesh=data_parallel)
    for method in ("prefill", "step"):
        register_fsdp_forward_method(model, method)
