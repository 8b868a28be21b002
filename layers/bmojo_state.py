"""What B'MOJO carries from call to call."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from memzoo.layers.mixer import SequenceMixer
from memzoo.layers.state import MixerState

Shapes = Mapping[str, tuple[int, ...] | None]
WIDE = ("eidetic_scores", "pending_scores", "targets", "eidetic_queries")
WHOLE = ("eidetic_positions", "eidetic_count", "eidetic_sequence")


@dataclass(frozen=True)
class BMojoState(MixerState):
    """The four memories but the weights; constant in size. None for what an option leaves out.

    Attributes:
        ssm: State of the state space.
        window_keys: (batch, window, kv_heads, head_dim) ring, token j in slot ``j % window``.
        window_values: The same.
        fading_keys: (batch, slots, kv_heads, head_dim) ring of every ``fading_stride``-th fading token,
            ``(lag + span) / stride`` of them, rounded up.
        fading_values: The same.
        eidetic_keys: (batch, num_eidetic, kv_heads, head_dim), in the order of positions.
        eidetic_values: The same.
        eidetic_scores: (batch, num_eidetic), at least float32.
        eidetic_positions: (batch, num_eidetic) int64.
        eidetic_count: (batch,) int64, slots that are taken, from the left; the others are zero.
        pending_scores: (batch, window) scores of the tokens of the chunk that has not ended.
        targets: (batch, predictor_taps, dim) what the predictor sees next, the latest last; at least float32.
        eidetic_sequence: (batch,) int64, what the row's tokens in the layer's ``store`` are called; 0 if there are
            none. With a store, the other fields hold what was fetched for the current chunk.
        eidetic_queries: (batch, kv_heads, head_dim) sum of the queries of the chunk that has not ended, with a store.
    """

    ssm: MixerState | None
    window_keys: Tensor | None
    window_values: Tensor | None
    fading_keys: Tensor | None
    fading_values: Tensor | None
    eidetic_keys: Tensor | None
    eidetic_values: Tensor | None
    eidetic_scores: Tensor | None
    eidetic_positions: Tensor | None
    eidetic_count: Tensor | None
    pending_scores: Tensor | None
    targets: Tensor | None
    eidetic_sequence: Tensor | None
    eidetic_queries: Tensor | None

    def age(self) -> Tensor | None:
        """Return how long ago the stored tokens were read, (batch,), on average; None without any."""
        if self.eidetic_positions is None or self.eidetic_count is None:
            return None
        slots = torch.arange(self.eidetic_positions.shape[1], device=self.position.device)
        ages = self.position[:, None] - self.eidetic_positions
        total = ages.masked_fill(slots >= self.eidetic_count[:, None], 0).sum(1)
        return total / self.eidetic_count.clamp_min(1)


def empty_state(
    shapes: Shapes, ssm: SequenceMixer | None, batch_size: int, device: torch.device | str, dtype: torch.dtype
) -> BMojoState:
    """Return the state of fresh rows.

    Args:
        shapes: Of a row of every tensor but those of the SSM; None for what is left out.
        ssm: Has a state of its own.
        batch_size: Rows.
        device: Where.
        dtype: Of keys and values; what must not be rounded is in at least float32.
    """
    dtypes = dict.fromkeys(shapes, dtype) | dict.fromkeys(WIDE, torch.promote_types(dtype, torch.float32))
    dtypes |= dict.fromkeys(WHOLE, torch.long)
    tensors = {
        name: None if shape is None else torch.zeros(batch_size, *shape, dtype=dtypes[name], device=device)
        for name, shape in shapes.items()
    }
    count = torch.zeros(batch_size, dtype=torch.long, device=device)
    own = None if ssm is None else ssm.initial_state(batch_size, device=device, dtype=dtype)
    return BMojoState(count, count.clone(), own, **tensors)


def check_state(state: BMojoState, shapes: Shapes, ssm: SequenceMixer | None) -> None:
    """Require a state of these shapes, and of the SSM.

    Raises:
        ValueError: It is another layer's.
    """
    expected = type(None) if ssm is None else ssm.state_class
    if not isinstance(state.ssm, expected):
        raise ValueError(
            f"state.ssm is a {type(state.ssm).__name__}, this layer's is {expected.__name__}: pass what its previous "
            f"call returned, or None to start afresh"
        )
    for name, shape in shapes.items():
        given = getattr(state, name)
        found = None if given is None else tuple(given.shape[1:])
        if found != shape:
            raise ValueError(
                f"state.{name} holds rows of shape {found}, this layer's are {shape}: pass what its previous call "
                f"returned, or None to start afresh"
            )
