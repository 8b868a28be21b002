"""GraphMemoryUpkeep: what the cells of a Graph Memory Transformer need in training besides gradients."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from memzoo.layers.errors import check_choice, check_number, check_positive
from memzoo.layers.graph_memory_cell import GraphMemoryCell
from memzoo.layers.graph_memory_measures import effective_number, off_diagonal_cosines, row_entropy
from memzoo.layers.graph_memory_upkeep import (
    all_reduce,
    commit,
    follow,
    graph_memory_cells,
    join,
    maintain,
    set_temperature,
)

States = Literal["last", "own"]
NOT_SUPPORTED = (DeepSpeedStrategy, FSDPStrategy)


def routing_temperature(progress: float, maximum: float, minimum: float) -> float:
    """Fall from ``maximum`` to ``minimum``, fast at first: ``maximum (minimum / maximum)^ln(1 + (e - 1) progress)``.

    Args:
        progress: Share of the training that is done, in [0, 1].
        maximum: Temperature at the start.
        minimum: Temperature at the end.

    Example:
        >>> [round(routing_temperature(quarter / 4, 1.0, 0.1), 3) for quarter in range(5)]
        [1.0, 0.439, 0.24, 0.149, 0.1]
    """
    return maximum * math.pow(minimum / maximum, math.log1p((math.e - 1) * progress))


class GraphMemoryUpkeep(Callback):
    """Anneal the cells' temperature, commit their statistics after every optimiser step, maintain their slots.

    The statistics of the micro-batches of a step, which ``CausalLMModule.training_step`` returns, are added up, over
    all devices too. Every device then makes the same commit; of maintenance, which draws states of tokens, rank 0's is
    handed to all. ``ModelParallelStrategy`` may shard the parameters of cells whose slots move by gradient alone.

    Logs ``train/temperature``, that of the batch, and ``train/graph_reset`` and ``train/graph_merged``, the slots
    seeded anew so far because they were dead, or because another was too similar; and every ``log_every_n_steps`` of
    the trainer how the slots are used: see ``slot_measures``.

    A checkpoint holds what a run needs to go on exactly from an optimiser step, such as where ``ModelCheckpoint``
    counts in steps, and the ``evaluation_temperature`` at which it was validated. One made within an accumulation lacks
    its statistics so far, as it lacks its gradients. Resumed with a schedule of another length, the temperature jumps:
    a warning says so.

    Args:
        temperature_max: Of the source routing at the first step; see ``routing_temperature``.
        temperature_min: At the last.
        schedule_steps: Optimiser steps between the two; the trainer's number by default.
        evaluation_temperature: Of validation and test; by default the current one, as the official training has it.
            The official downstream evaluations take ``temperature_min``.
        maintain_every: Optimiser steps from one maintenance to the next; None for no maintenance.
        states: Slots are seeded with states of the "last" cell, as in the official code, or of each cell's "own".
        seed: Of the draws of maintenance.

    Raises:
        ValueError: An argument is out of its range.

    Reference:
        Zanarini and Ferrari, arXiv 2604.23862; schedule and maintenance as in the official code.
    """

    def __init__(
        self,
        *,
        temperature_max: float = 1.0,
        temperature_min: float = 0.1,
        schedule_steps: int | None = None,
        evaluation_temperature: float | None = None,
        maintain_every: int | None = 110,
        states: States = "last",
        seed: int = 0,
    ) -> None:
        check_number("temperature_max", temperature_max)
        check_number("temperature_min", temperature_min)
        if schedule_steps is not None:
            check_positive("schedule_steps", schedule_steps)
        if evaluation_temperature is not None:
            check_number("evaluation_temperature", evaluation_temperature)
        if maintain_every is not None:
            check_positive("maintain_every", maintain_every, "use a whole number >= 1, or None for no maintenance")
        check_choice("states", states, get_args(States))
        self.temperatures = temperature_max, temperature_min
        self.schedule_steps = schedule_steps
        self.evaluation_temperature = evaluation_temperature
        self.maintain_every = maintain_every
        self.states: States = states
        self.counts = {"reset": 0, "merged": 0}
        self._generator = torch.Generator().manual_seed(seed)
        self._steps = math.inf
        self._resumed_steps: float | None = None  # length of the schedule that a checkpoint was made in
        self._step = 0
        self._temperature = temperature_max
        self._pending: dict[str, Tensor] = {}
        self._replaced: list[Tensor] = []  # temperatures of the cells, while those of evaluation are in their place

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, where the draws are, and by which temperatures it was trained and validated."""
        return {
            "counts": dict(self.counts),
            "generator": self._generator.get_state(),
            "schedule_steps": None if math.isinf(self._steps) else self._steps,
            "evaluation_temperature": self.evaluation_temperature,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting and drawing; the temperatures are those of the arguments."""
        self.counts = dict(state_dict["counts"])
        self._generator.set_state(state_dict["generator"])
        self._resumed_steps = state_dict["schedule_steps"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there are cells and that the strategy can change them.

        Raises:
            ValueError: There are none; the strategy shards what is changed whole, or in a way that is not supported; or
                it has replicas and write_back is "reference".
        """
        cells = _cells(pl_module)
        if stage != "fit":
            return
        name = type(trainer.strategy).__name__
        if isinstance(trainer.strategy, NOT_SUPPORTED):
            raise ValueError(
                f"strategy={name} is not supported, for it does not keep a cell's parameters apart; use "
                f"strategy='ddp', or ModelParallelStrategy with write_back='off' and maintain_every=None"
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            self._check_sharded(name, cells)
        if trainer.world_size > 1 and any(cell.write_back == "reference" for cell in cells):
            raise ValueError(
                f"write_back='reference' changes every device's centroids by its own batches, so that the "
                f"{trainer.world_size} replicas of {name} part; use write_back='deferred'"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the length of the schedule.

        Raises:
            ValueError: It has no end.
        """
        steps = self.schedule_steps or trainer.estimated_stepping_batches
        self._steps = math.inf if steps == -1 else steps  # -1: epochs of no known length
        maximum, minimum = self.temperatures
        if math.isinf(self._steps) and maximum != minimum:
            raise ValueError(
                f"temperature_max={maximum} falls to temperature_min={minimum} over a training without an end; "
                f"set max_steps of the trainer or schedule_steps, or make the two equal"
            )
        before, self._resumed_steps = self._resumed_steps, None
        if before not in (None, self._steps) and maximum != minimum:
            rank_zero_warn(
                f"the checkpoint's temperature falls over {before} optimiser steps, this run's over {self._steps}, so "
                f"that it jumps here; pass schedule_steps={before} to GraphMemoryUpkeep to go on as it was"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the temperature of the first batch."""
        self._step, self._pending = trainer.global_step, {}
        self._anneal(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up the statistics; after an optimiser step commit them, maintain if it is time, and go on annealing.

        Raises:
            ValueError: ``outputs`` has no statistics.
        """
        statistics = outputs.get("statistics")
        if not statistics:
            raise ValueError(
                f"outputs={list(outputs)} of training_step of {type(pl_module).__name__} has no statistics of the "
                f"cells; return {{'loss': loss, 'statistics': trace.statistics}}, as CausalLMModule does"
            )
        self._pending = join([self._pending, statistics]) if self._pending else dict(statistics)
        pl_module.log("train/temperature", self._temperature)
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self._keep_up(trainer, pl_module)
            self._pending = {}
            self._anneal(pl_module)
            every: int = cast(Any, trainer).log_every_n_steps  # 0: never
            if every and self._step % every == 0:
                for name, value in slot_measures(_cells(pl_module)).items():
                    pl_module.log(f"train/{name}", value)
        if self.maintain_every is not None:
            for name, count in self.counts.items():
                pl_module.log(f"train/graph_{name}", float(count))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the temperature of evaluation, if there is one."""
        if self.evaluation_temperature is not None:
            self._replaced = [cell.temperature.clone() for cell in _cells(pl_module)]
            set_temperature(_model(pl_module), self.evaluation_temperature)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back the temperatures that were there."""
        if self._replaced:
            for cell, temperature in zip(_cells(pl_module), self._replaced, strict=True):
                cell.temperature.copy_(temperature)
            self._replaced = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the temperature of evaluation, if there is one."""
        self.on_validation_start(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back the temperatures that were there."""
        self.on_validation_end(trainer, pl_module)

    def _check_sharded(self, strategy: str, cells: Sequence[GraphMemoryCell]) -> None:
        changes = {f"write_back={cell.write_back!r}" for cell in cells if cell.write_back != "off"}
        if self.maintain_every is not None:
            changes.add(f"maintain_every={self.maintain_every}")
        if changes:
            raise ValueError(
                f"strategy={strategy} shards the centroids, which {' and '.join(sorted(changes))} would change whole; "
                f"use write_back='off' and maintain_every=None, or strategy='ddp'"
            )

    def _anneal(self, pl_module: LightningModule) -> None:
        self._temperature = routing_temperature(min(self._step / self._steps, 1.0), *self.temperatures)
        set_temperature(_model(pl_module), self._temperature)

    def _keep_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = _model(pl_module)
        if trainer.world_size > 1:
            self._pending = all_reduce(self._pending)
        commit(model, self._pending)
        if self.maintain_every is None or self._step % self.maintain_every:
            return
        for name, count in maintain(model, self._pending, self._generator, states=self.states).items():
            self.counts[name] += count
        if trainer.world_size > 1:
            follow(model)


@torch.no_grad()
def slot_measures(cells: Sequence[GraphMemoryCell]) -> dict[str, Tensor]:
    """Return how the slots of all cells are used, by the cells' parameters and buffers alone.

    ``usage_effective`` and ``usage_effective_min``: how many slots are in use, the mean and the least of the cells;
    ``dead_slots``, in all of them together; means of ``gate``, ``momentum``, ``edge_entropy`` (nats) and
    ``centroid_cosine``. Each is what a cell's signals say of it (``memzoo.layers.graph_memory_signals``).

    Every device must call it where the parameters are sharded.
    """
    effective = torch.stack([effective_number(cell.usage) for cell in cells])
    dead = torch.stack([(cell.usage < cell.dead_usage).sum() for cell in cells])
    means: dict[str, Callable[[GraphMemoryCell], Tensor]] = {
        "gate": lambda cell: _whole(cell.gate).sigmoid(),
        "momentum": lambda cell: _whole(cell.momentum).sigmoid(),
        "edge_entropy": lambda cell: row_entropy(_transitions(_whole(cell.edges))),
        "centroid_cosine": lambda cell: off_diagonal_cosines(_whole(cell.centroids)),
    }
    return {
        "usage_effective": effective.mean(),
        "usage_effective_min": effective.min(),
        "dead_slots": dead.sum().float(),
    } | {name: torch.stack([measure(cell).mean() for cell in cells]).mean() for name, measure in means.items()}


def _transitions(edges: Tensor) -> Tensor:
    return edges.masked_fill(torch.eye(len(edges), dtype=torch.bool, device=edges.device), -torch.inf).softmax(-1)


def _whole(parameter: Tensor) -> Tensor:
    """Return a parameter, gathered from all devices if it is sharded."""
    from torch.distributed.tensor import DTensor

    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _model(pl_module: LightningModule) -> nn.Module:
    return cast(nn.Module, pl_module.model)


def _cells(pl_module: LightningModule) -> list[GraphMemoryCell]:
    return list(graph_memory_cells(_model(pl_module)).values())
