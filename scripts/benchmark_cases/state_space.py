"""Benchmarks of Mamba and Mamba-2 against their loops, mambapy and Hugging Face's layers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmark_cases.case import Case, Variant, Work, missing, mixer, train, train_function
from benchmark_cases.recurrence import step
from memzoo.layers import Mamba, Mamba2
from memzoo.layers.ops.selective_scan import selective_scan
from memzoo.layers.ops.state_space_dual import state_space_dual
from memzoo.layers.reference.selective_scan import selective_scan as scan_loop
from memzoo.layers.reference.state_space_dual import state_space_dual as dual_loop

BATCH, TIME, DIM, STATES = 2, 2048, 128, 16
CHANNELS = 2 * DIM
LOOP_TOKENS = 512
KEPT_PAGES = (
    "In a process that keeps what it frees, as the `memzoo` command does (docs/training.md): without, the tensors of "
    "the longest rows are made of fresh pages each time."
)
MAMBAPY = "mambapy, MambaBlock"
SLOW_TOKENS = 1024
SLOW_PATH = f"transformers, MambaMixer, {SLOW_TOKENS} tokens"
HUGGING_FACE_2 = "transformers, Mamba2Mixer"


class OutputOnly(nn.Module):
    """A layer of others, which returns no state, as a mixer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return (y, no state)."""
        y: Tensor = self.layer(x)
        return y, None


def layer(name: str, build: Callable[[], nn.Module], package: str = "memzoo", *, time: int = TIME) -> Variant:
    """Forward and backward of a layer of width ``DIM``."""
    return Variant(name, lambda: train(build(), BATCH, time, DIM), BATCH * time, missing=missing(package))


def mambapy() -> nn.Module:
    """Build mambapy's layer, with its tree scan."""
    from mambapy.mamba import MambaBlock, MambaConfig

    return OutputOnly(MambaBlock(MambaConfig(d_model=DIM, n_layers=1, d_state=STATES)))


def slow_path() -> nn.Module:
    """Build transformers' Mamba layer, which loops over tokens where no CUDA kernels are."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    return OutputOnly(MambaMixer(MambaConfig(hidden_size=DIM, state_size=STATES, num_hidden_layers=1), layer_idx=0))


def hugging_face_2(heads: int, width: int) -> nn.Module:
    """Build transformers' Mamba-2 layer."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    sizes: dict[str, Any] = dict(num_heads=heads, head_dim=width, state_size=width, n_groups=1, chunk_size=64)
    return OutputOnly(Mamba2Mixer(Mamba2Config(hidden_size=DIM, num_hidden_layers=1, **sizes), layer_idx=0))


def scan_inputs(time: int) -> list[Tensor]:
    """Return x, dt, A, B, C as they are at the start of training."""
    x, dt = torch.randn(BATCH, time, CHANNELS), 0.001 + 0.1 * torch.rand(BATCH, time, CHANNELS)
    A = -torch.arange(1.0, STATES + 1).expand(CHANNELS, -1).contiguous()
    return [x, dt, A, *torch.randn(2, BATCH, time, STATES)]


def dual_inputs(time: int, heads: int, width: int) -> list[Tensor]:
    """Return x, dt, A, B, C, one group for all heads."""
    x, dt = torch.randn(BATCH, time, heads, width), 0.001 + 0.1 * torch.rand(BATCH, time, heads)
    return [x, dt, -16 * torch.rand(heads), *torch.randn(2, BATCH, time, 1, width)]


def scanned(
    name: str, function: Callable[..., tuple[Tensor, Tensor]], inputs: Callable[[], list[Tensor]], time: int
) -> Variant:
    """Forward and backward of an op."""

    def build() -> Work:
        return train_function(lambda *t: function(*t)[0], inputs())

    return Variant(name, build, BATCH * time)


def dual_case(heads: int = 4, width: int = 64) -> Case:
    """Mamba-2's recurrence against its loop."""
    loop = f"memzoo reference loop, {LOOP_TOKENS} tokens"
    return Case(
        "state_space_dual",
        "state_space",
        f"Mamba-2's recurrence: {BATCH} rows of {TIME} tokens, {heads} heads, P = N = {width}; forward and backward",
        [
            scanned("memzoo ops.state_space_dual", state_space_dual, lambda: dual_inputs(TIME, heads, width), TIME),
            scanned(loop, dual_loop, lambda: dual_inputs(LOOP_TOKENS, heads, width), LOOP_TOKENS),
        ],
        targets={loop: 20.0},
    )


CASES = [
    Case(
        "mamba",
        "state_space",
        f"Mamba: {BATCH} rows of {TIME} tokens, width {DIM}, {CHANNELS} channels, N = {STATES}; forward and backward",
        [
            layer("memzoo Mamba", lambda: Mamba(DIM, state_dim=STATES)),
            layer(MAMBAPY, mambapy, "mambapy"),
            layer(SLOW_PATH, slow_path, "transformers", time=SLOW_TOKENS),
        ],
        note="The backward pass of transformers' loop is quadratic in the tokens; at 2048 a call takes minutes.",
        targets={MAMBAPY: 1.5, SLOW_PATH: 50.0},
        most_memory={MAMBAPY: 0.5},
    ),
    Case(
        "selective_scan",
        "state_space",
        f"Mamba's scan alone: {BATCH} rows of {TIME} tokens, {CHANNELS} channels, N = {STATES}; forward and backward",
        [
            scanned("memzoo ops.selective_scan", selective_scan, lambda: scan_inputs(TIME), TIME),
            scanned(
                f"memzoo reference loop, {LOOP_TOKENS} tokens", scan_loop, lambda: scan_inputs(LOOP_TOKENS), LOOP_TOKENS
            ),
        ],
    ),
    dual_case(),
    Case(
        "mamba2",
        "state_space",
        f"Mamba-2: {BATCH} rows of {TIME} tokens, width {DIM}, 4 heads, P = N = 64; forward and backward",
        [
            layer("memzoo Mamba2", lambda: Mamba2(DIM, head_dim=64, state_dim=64)),
            layer(HUGGING_FACE_2, lambda: hugging_face_2(4, 64), "transformers"),
        ],
        targets={HUGGING_FACE_2: 1.5},
    ),
    Case(
        "mamba_growth",
        "state_space",
        "Mamba, growth with length: width 128; forward and backward",
        [mixer("Mamba", lambda: Mamba(DIM), time) for time in (2048, 4096, 8192, 16384, 32768)],
        note=KEPT_PAGES,
        axis="length",
        keeps_memory=True,
    ),
    Case(
        "mamba2_growth",
        "state_space",
        "Mamba-2, growth with length: width 128, 4 heads, P = N = 64; forward and backward",
        [
            mixer("Mamba2", lambda: Mamba2(DIM, head_dim=64, state_dim=64), time)
            for time in (2048, 4096, 8192, 16384, 32768)
        ],
        note=KEPT_PAGES,
        axis="length",
        keeps_memory=True,
    ),
    Case(
        "mamba_step",
        "state_space",
        "Mamba, one step of decoding after a context: width 256",
        [step(lambda: Mamba(256), 256, context) for context in (64, 1024, 16384)],
        axis="context",
        has_memory=False,
    ),
    Case(
        "mamba2_step",
        "state_space",
        "Mamba-2, one step of decoding after a context: width 256",
        [step(lambda: Mamba2(256), 256, context) for context in (64, 1024, 16384)],
        axis="context",
        has_memory=False,
    ),
]
