"""What trains a side memory along a document: an optimiser and a warm-up that start afresh with each."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memzoo.layers.side_memory import SideMemory
from memzoo.lit_modules.schedule import make_scheduler

EPS = 1e-7  # of AdamW
FUSED = ("cpu", "cuda")  # devices with a step of AdamW in one pass, whatever else torch knows


class MemoryLearner:
    """A memory and what trains it along one document.

    Args:
        memory: Attached.
        chosen: Hyper-parameters of a ``TestTimeTrainingModule``.
    """

    def __init__(self, memory: SideMemory, chosen: Mapping[str, Any]) -> None:
        self.memory = memory.eval()
        self._chosen = chosen

    def start(self) -> None:
        """Forget the document before."""
        chosen = self._chosen
        self.memory.reset()
        parameters = list(self.memory.parameters())
        self._optimizer = torch.optim.AdamW(
            parameters,
            lr=chosen["memory_learning_rate"],
            betas=tuple(chosen["memory_betas"]),
            eps=EPS,
            weight_decay=chosen["memory_weight_decay"],
            fused=all(parameter.device.type in FUSED for parameter in parameters),
        )
        warmup = chosen["memory_warmup_steps"]
        self._schedule = make_scheduler(self._optimizer, "constant", warmup_steps=warmup, max_steps=1)

    def step(self, loss: Tensor) -> None:
        """Update the memory by the gradient of a loss."""
        loss.backward()
        limit = self._chosen["memory_max_gradient_norm"]
        if limit is not None:
            nn.utils.clip_grad_norm_(self.memory.parameters(), limit)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        self.memory.constrain()
