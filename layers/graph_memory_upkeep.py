"""Upkeep of a model's graph memories: temperature, commits after the optimiser's step, maintenance.

A training loop by hand; ``memzoo.lit_modules.GraphMemoryUpkeep`` does the same under Lightning:

    for step, tokens in enumerate(batches):
        set_temperature(model, temperature_at(step))
        trace = Trace(signals=False)
        logits, _ = model(tokens, trace=trace)
        (loss_of(logits) + sum(trace.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        commit(model, trace.statistics)
        if (step + 1) % 110 == 0:
            maintain(model, trace.statistics, generator)
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from memzoo.layers.errors import check_choice, check_number
from memzoo.layers.graph_memory_cell import GraphMemoryCell
from memzoo.layers.graph_memory_slots import check_statistics

Statistics = Mapping[str, Tensor]
NOT_SUMMED = "states"


def graph_memory_cells(model: nn.Module) -> dict[str, GraphMemoryCell]:
    """Return a model's graph memory cells by their paths, in order.

    Raises:
        ValueError: It has none.
    """
    cells = {_own_path(path): module for path, module in model.named_modules() if isinstance(module, GraphMemoryCell)}
    if not cells:
        raise ValueError(f"model={type(model).__name__} has no GraphMemoryCell; pass a model that has some")
    return cells


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Set the temperature of all cells of a model.

    Raises:
        ValueError: The model has none, or the temperature is not above zero.
    """
    check_number("temperature", temperature)
    for cell in graph_memory_cells(model).values():
        cell.temperature.fill_(temperature)


def join(parts: Sequence[Statistics]) -> dict[str, Tensor]:
    """Add up the statistics of several passes; of the tokens' states, those of the last are kept.

    Args:
        parts: ``trace.statistics`` of each pass, of one model.
    """
    joined: dict[str, Tensor] = {}
    for part in parts:
        for path, value in part.items():
            summed = path in joined and path.rpartition(".")[2] != NOT_SUMMED
            joined[path] = joined[path] + value if summed else value
    return joined


def all_reduce(statistics: Statistics) -> dict[str, Tensor]:
    """Add up the statistics of all processes of a data-parallel training, in one call; each keeps its tokens' states.

    Since tokens differ, so would what ``maintain`` seeds: call ``follow`` after it.

    Args:
        statistics: ``trace.statistics``, or ``join`` of several, of one and the same model in every process.
    """
    sums = {path: value for path, value in statistics.items() if path.rpartition(".")[2] != NOT_SUMMED}
    flat = torch.cat([value.flatten() for value in sums.values()])
    torch.distributed.all_reduce(flat)
    parts = flat.split([value.numel() for value in sums.values()])
    totals = {path: part.view_as(value) for (path, value), part in zip(sums.items(), parts, strict=True)}
    return {**statistics, **totals}


@torch.no_grad()
def follow(model: nn.Module, rank: int = 0) -> None:
    """Take the slots of a model's cells from one process of a data-parallel training, in one call."""
    cells = graph_memory_cells(model).values()
    slots = [tensor for cell in cells for tensor in (cell.centroids, cell.usage, cell.age)]
    flat = torch.cat([tensor.flatten() for tensor in slots])
    torch.distributed.broadcast(flat, src=rank)
    for tensor, values in zip(slots, flat.split([tensor.numel() for tensor in slots]), strict=True):
        tensor.copy_(values.view_as(tensor))


def commit(model: nn.Module, statistics: Statistics) -> None:
    """Let every cell of a model advance its usage and write back; call it after the optimiser's step.

    Args:
        model: Whose cells.
        statistics: ``trace.statistics`` of the step's pass, or ``join`` of those of its passes.

    Raises:
        ValueError: The model has no cell, or the statistics of one are missing or of another shape. Nothing is changed
            then.
    """
    cells = graph_memory_cells(model)
    for path, cell in cells.items():
        check_statistics(statistics, cell.statistics(), _prefix(path))
    for path, cell in cells.items():
        cell.commit({name: statistics[f"{_prefix(path)}{name}"] for name in cell.statistics()})


def maintain(
    model: nn.Module, statistics: Statistics, generator: torch.Generator, *, states: Literal["last", "own"] = "last"
) -> dict[str, int]:
    """Let every cell of a model seed its dead and its double slots with the directions of tokens.

    Args:
        model: Whose cells.
        statistics: As in ``commit``; the tokens' states in it are used.
        generator: Of the choice among the tokens; on the CPU.
        states: Whose tokens: "last", those that the last cell's block returned, for all cells, as in the official code;
            "own", for every cell those of its own block.

    Returns:
        How many slots were seeded because they were ``reset`` and ``merged``.

    Raises:
        ValueError: The model has no cell, or the states are missing.
    """
    check_choice("states", states, ("last", "own"))
    cells = graph_memory_cells(model)
    last = next(reversed(cells))
    total = {"reset": 0, "merged": 0}
    for path, cell in cells.items():
        name = f"{_prefix(last if states == 'last' else path)}states"
        if name not in statistics:
            raise ValueError(f"statistics[{name!r}] is missing; pass trace.statistics of a pass in training mode")
        for reason, count in cell.maintain(statistics[name], generator).items():
            total[reason] += count
    return total


def _own_path(path: str) -> str:
    """Return where the trace has a module: without what torch.compile and data parallelism wrap it in."""
    parts = [part for part in path.split(".") if part != "_orig_mod"]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def _prefix(path: str) -> str:
    return f"{path}." if path else ""
