"""CarriedStates: the states that truncated backpropagation through time hands from batch to batch."""

from typing import Any

from torch import Tensor, nn

from memzoo.layers.state import State


class CarriedStates:
    """The state in which the last batch of each stage ended, without its graph.

    A stage starts afresh with its first batch and where the number of rows changes.
    """

    def __init__(self) -> None:
        self._states: dict[str, State] = {}

    def get(self, stage: str, batch_idx: int, tokens: Tensor) -> State | None:
        """Return the state that a batch of ``tokens`` (batch, time) starts from; None to start afresh."""
        state = self._states.get(stage)
        if state is None or batch_idx == 0 or state.batch_size != len(tokens):
            return None
        return state.to(tokens.device)

    def put(self, stage: str, state: State) -> None:
        """Keep the state in which a batch ended, cut from its graph."""
        self._states[stage] = state.detach()

    def drop(self, stage: str) -> None:
        """Forget a stage's state."""
        self._states.pop(stage, None)

    def save(self, stage: str) -> dict[str, Any] | None:
        """Return a stage's state as plain tensors for a checkpoint, or None."""
        state = self._states.get(stage)
        if state is None:
            return None
        # Cloned: a tensor that is a view would be stored with everything it is a view of.
        return {"rows": state.batch_size, "tensors": list(state.clone().named_tensors().values())}

    def load(self, stage: str, saved: dict[str, Any], model: nn.Module) -> None:
        """Take up what ``save`` returned, of the same model."""
        tensors = iter(saved["tensors"])
        structure: State = model.initial_state(saved["rows"])  # type: ignore[operator]
        self._states[stage] = structure.map(lambda _: next(tensors))
