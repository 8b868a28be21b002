"""Layers, inputs and comparisons for the tests of BMojo."""

from typing import Any

import torch
from hypothesis import settings
from torch import Tensor
from torch.utils._pytree import tree_leaves

from memzoo.layers.bmojo import BMojo, BMojoState
from memzoo.layers.mixer import SequenceMixer, counters
from memzoo.layers.state import MixerState

DIM, WINDOW = 8, 3
SMALL: dict[str, Any] = {
    "num_heads": 2,
    "window": WINDOW,
    "ssm": "mamba2",
    "ssm_options": {"head_dim": 4, "state_dim": 3, "chunk_size": 4},
}
DELTA: dict[str, Any] = {"ssm": "gated_deltanet", "ssm_options": {"num_heads": 2, "head_dim": 4, "chunk_size": 4}}
TIMES = (1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 1, 5 * WINDOW + 3)
CASES: list[dict[str, Any]] = [
    {},
    {"tie_projections": False, "qk_norm": False, "bias": True},
    {"num_eidetic": 4},
    {"num_eidetic": 3, "tie_projections": False, "num_kv_heads": 1, "segment_bias": True},
    {"num_eidetic": 2, "target": "input", "predictor": "previous", "score": "l2", "eidetic_positions": "clamp"},
    {"num_eidetic": 5, "predictor": "conv", "score": "cosine", "eidetic_positions": "none", "warmup_score": 0.0}
    | DELTA,
    {"num_eidetic": 3, "selection": "threshold", "threshold": 0.6, "fading_stride": WINDOW, "fading_span": 9},
    {
        "num_eidetic": 3,
        "selection": "fifo",
        "fading_span": 0,
        "target": "input",
        "predictor_taps": 2,
        "predictor_rate": 0.3,
    },
    {"num_eidetic": 3, "selection": "random", "fading_lag": 1, "fading_span": 2, "rotary_base": None},
    {"num_eidetic": 2, "in_context": False, "fading_lag": 0, "fading_span": 4, "fading_stride": 1},
    {"num_eidetic": 4, "fading_lag": 5, "fading_span": 4, "fading_stride": 2, "num_kv_heads": 1},
    {"num_eidetic": 2, "window": 1, "segment_bias": True},
    {"num_eidetic": 3, "score": "residual", "eidetic_norm": True, "ssm_output": True, "fading_span": 0} | DELTA,
    {"num_eidetic": 3, "eidetic_norm": True, "eidetic_positions": "clamp", "num_kv_heads": 1, "ssm_output": True},
]
few_cases = settings(max_examples=15, deadline=None, derandomize=True, database=None)


class Identity(SequenceMixer):
    """An SSM whose fading tokens are the tokens themselves; to the right of a row's end it leaves NaN, as it may."""

    def initial_state(self, batch_size, *, device=None, dtype=None):
        return MixerState(*(torch.zeros(batch_size, dtype=torch.long, device=device) for _ in range(2)))

    def mix(self, x, state, *, lengths, trace, donate):
        _, after, document = counters(state, x, lengths)
        if lengths is not None:
            x = x.masked_fill((torch.arange(x.shape[1]) >= lengths[:, None])[..., None], torch.nan)
        return x, MixerState(after, document)


class Given(Identity):
    """An SSM whose fading tokens are given, whatever the input; for one call of fresh rows."""

    def __init__(self, dim: int, time: int) -> None:
        super().__init__(dim)
        self.f = torch.nn.Parameter(torch.randn(time, dim, generator=torch.Generator().manual_seed(5)))

    def mix(self, x, state, *, lengths, trace, donate):
        _, state = super().mix(x, state, lengths=lengths, trace=trace, donate=donate)
        return self.f.expand(len(x), -1, -1), state


def build(seed: int = 0, **options: Any) -> BMojo:
    """A small layer in float64 whose every parameter is random."""
    torch.manual_seed(seed)
    layer = BMojo(DIM, **SMALL | options).double()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return layer


def tokens(batch: int = 2, time: int = 5 * WINDOW + 3, seed: int = 1) -> Tensor:
    return torch.randn(batch, time, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of_a_flat_softmax(layer: BMojo, x: Tensor) -> tuple[Tensor, Tensor]:
    """How much every query reads of every input and fading token (time, time) where all keys are equal.

    The queries are set to zero and values and outputs to what they are of, so that y_i is the mean of all that i sees.
    """
    with torch.no_grad():
        layer.query.weight.zero_()
        layer.value.weight.copy_(torch.eye(DIM))
        layer.out.weight.copy_(torch.eye(DIM))
    leaves = x.clone().requires_grad_(), layer.ssm.f
    y, _ = layer(leaves[0])
    grads = [torch.autograd.grad(y_i[0], leaves, retain_graph=True) for y_i in y[0]]
    return torch.stack([raw[0, :, 0] for raw, _ in grads]), torch.stack([fading[:, 0] for _, fading in grads])


def kept_positions(state: BMojoState) -> list[list[int]]:
    """The positions of the eidetic tokens of every row, as they lie in the state: sorted."""
    return [row[:n].tolist() for row, n in zip(state.eidetic_positions, state.eidetic_count, strict=True)]


def kept_scores(state: BMojoState) -> list[list[float]]:
    """The scores of the eidetic tokens of every row, in the same order."""
    return [row[:n].tolist() for row, n in zip(state.eidetic_scores, state.eidetic_count, strict=True)]


def run_by(layer: BMojo, x: Tensor, cuts: list[int], state: BMojoState | None = None) -> tuple[Tensor, BMojoState]:
    """Run the pieces between cuts one after the other, handing the state on."""
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        y, state = layer(x[:, start:end], state)
        pieces.append(y)
    assert state is not None
    return torch.cat(pieces, 1), state


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(tree_leaves(actual), tree_leaves(expected), rtol=tolerance, atol=tolerance)


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, 0)
