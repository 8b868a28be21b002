"""TrainedRun: what the checkpoint of a run says of it, and the model that is in it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from memzoo.layers.errors import check_number
from memzoo.layers.graph_memory_cell import GraphMemoryCell
from memzoo.layers.graph_memory_upkeep import set_temperature
from memzoo.lit_modules.checkpoint import check_checkpoint
from memzoo.lit_modules.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint that names its model, read as far as its settings; the weights wait for ``load``.

    Attributes:
        checkpoint: A .ckpt file that a run has written.
        device: Where the model is to be.
        tokenizer: Turns text into the tokens that the model knows.
        model: Name in the registry.
        overrides: Arguments in place of the named model's own.
        routing_temperature: Of all graph memory cells; None for what is stored with their weights.
    """

    checkpoint: str
    device: str
    tokenizer: Tokenizer
    model: str
    overrides: dict[str, Any]
    routing_temperature: float | None = None

    @classmethod
    def find(
        cls,
        checkpoint: str,
        *,
        tokenizer: str | None = None,
        device: str = "cpu",
        routing_temperature: float | None = None,
    ) -> Self:
        """Read the settings of the run.

        Args:
            checkpoint: A .ckpt file that a run has written.
            tokenizer: "bytes" or a tokenizer.json; the one the model was trained with by default.
            device: "cpu" or "cuda".
            routing_temperature: Of all graph memory cells; that at which the run was evaluated by default.

        Raises:
            ValueError: It is no such file, it does not name its model, tokenizer or device are not there, or the
                temperature is not above zero or the model has no graph memory cells.
        """
        if routing_temperature is not None:
            check_number("routing_temperature", routing_temperature)
        check_checkpoint("checkpoint", checkpoint)
        if not Path(checkpoint).is_file():
            raise ValueError(f"checkpoint={checkpoint!r} is not a file; pass a .ckpt file that a run has written")
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={device!r} is not here; use device='cpu'")
        stored = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        trained_with = stored.get("datamodule_hyper_parameters", {}).get("tokenizer", "bytes")
        chosen = stored.get("hyper_parameters", {})
        if not isinstance(chosen.get("model"), str):
            raise ValueError(
                f"checkpoint={checkpoint!r} does not name its model; load it in Python with load_from_checkpoint"
            )
        from memzoo.arch import model_card

        if (task := model_card(chosen["model"]).task) != "language":
            raise ValueError(
                f"checkpoint={checkpoint!r} is of model={chosen['model']!r}, whose task is {task}, and has no text to "
                f"read or write; load it with ClassIncrementalModule.load_from_checkpoint"
            )
        coder = load_tokenizer(tokenizer or trained_with)
        upkeep = stored.get("callbacks", {}).get("GraphMemoryUpkeep", {})
        temperature = upkeep.get("evaluation_temperature") if routing_temperature is None else routing_temperature
        run = cls(checkpoint, device, coder, chosen["model"], chosen.get("overrides") or {}, temperature)
        if temperature is not None and not any(isinstance(layer, GraphMemoryCell) for layer in run.outline().modules()):
            raise ValueError(
                f"routing_temperature={temperature} is of graph memory cells, and model={run.model!r} has none; leave "
                f"it out"
            )
        return run

    def outline(self) -> Any:
        """Return the model without its weights, on the meta device: its sizes.

        Raises:
            ValueError: There is no model of that name, or its arguments have changed.
        """
        from memzoo.arch import create_model

        with torch.device("meta"):
            return create_model(self.model, **self.overrides)

    def load(self) -> Any:
        """Return the model with its weights, in eval mode."""
        from memzoo.lit_modules.causal_lm import CausalLMModule

        model = CausalLMModule.load_from_checkpoint(self.checkpoint, map_location=self.device).eval().model
        if self.routing_temperature is not None:
            set_temperature(model, self.routing_temperature)
        return model
