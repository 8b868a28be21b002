"""Benchmarks of the linear recurrences and of Mixture-of-Memories, against their loops and Hugging Face's fallback."""

from collections.abc import Callable
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn

from benchmark_cases.case import Case, Variant, Work, missing, mixer, train, train_function
from benchmark_cases.products import delta_products
from memzoo.layers import GatedDeltaNet, MixtureOfMemories
from memzoo.layers.ops.delta_rule import delta_rule
from memzoo.layers.ops.linear_recurrence import linear_recurrence
from memzoo.layers.reference.delta_rule import delta_rule as delta_rule_loop

HUGGING_FACE = "transformers, torch_chunk_gated_delta_rule"
LOOP_TOKENS = 256
PLAIN = "GatedDeltaNet"


def inputs(time: int, heads: int, head_dim: int, *, decay: str | None = "head") -> list[Tensor]:
    """Return q, k, v, beta and the log decay of each head or channel; none for None."""
    q, k, v = (torch.randn(1, time, heads, head_dim) for _ in range(3))
    gates = [torch.rand(1, time, heads)]
    if decay is not None:
        gates.append(-torch.rand(1, time, heads, *([head_dim] if decay == "channel" else [])))
    return [nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1), v, *gates]


def rule(
    name: str, function: Callable[..., tuple[Tensor, ...]], time: int, heads: int, head_dim: int, **options: Any
) -> Variant:
    """Forward and backward of a delta rule; ``decay`` as in ``inputs``."""
    decay = options.pop("decay", "head")
    return Variant(
        name,
        lambda: train_function(lambda *t: function(*t, **options)[0], inputs(time, heads, head_dim, decay=decay)),
        time,
    )


def adding(name: str, time: int, heads: int, head_dim: int, decay: str | None) -> Variant:
    """Forward and backward of ``linear_recurrence``."""

    def build() -> Work:
        q, k, v, _, *log_decay = inputs(time, heads, head_dim, decay=decay)
        return train_function(lambda *t: linear_recurrence(*t)[0], [q, k, v, *log_decay])

    return Variant(name, build, time)


def hugging_face(time: int, heads: int, head_dim: int) -> Variant:
    """The chunked fallback of transformers' Qwen3-Next, which runs without Triton."""

    def build() -> Work:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

        fallback = unwrap(torch_chunk_gated_delta_rule)  # what wraps it calls fla's kernels where fla is installed

        def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
            y: Tensor = fallback(q, k, v, log_decay, beta, chunk_size=64)[0]
            return y

        return train_function(run, inputs(time, heads, head_dim))

    return Variant(HUGGING_FACE, build, time, missing=missing("transformers"))


def against_peers(time: int = 2048, heads: int = 4, head_dim: int = 64) -> Case:
    """Gated DeltaNet's recurrence: ours, Hugging Face's, the loop."""
    loop = f"memzoo reference loop, {min(time, LOOP_TOKENS)} tokens"
    ours = rule("memzoo ops.delta_rule", delta_rule, time, heads, head_dim)
    return Case(
        "delta_rule",
        "recurrence",
        f"Gated delta rule, a decay a head: {time} tokens, {heads} heads, K = V = {head_dim}; forward and backward",
        [
            Variant(
                ours.name,
                ours.build,
                time,
                delta_products(1, time, heads, head_dim=head_dim, chunk_size=min(64, time)),
            ),
            rule("memzoo ops.delta_rule, chunk_size=32", delta_rule, time, heads, head_dim, chunk_size=32),
            hugging_face(time, heads, head_dim),
            rule(loop, delta_rule_loop, min(time, LOOP_TOKENS), heads, head_dim),
        ],
        note="The floor is the time that the counted products take at the measured matmul rate.",
        targets={HUGGING_FACE: 1.5, loop: 20.0},
        least_share=1 / 3,
    )


def family(time: int = 2048, heads: int = 4, head_dim: int = 64) -> Case:
    """What every rule costs."""
    return Case(
        "recurrence_family",
        "recurrence",
        f"The rules side by side: {time} tokens, {heads} heads, K = V = {head_dim}; forward and backward",
        [
            rule("Gated DeltaNet (delta rule, a decay a head)", delta_rule, time, heads, head_dim),
            rule("DeltaNet (delta rule)", delta_rule, time, heads, head_dim, decay=None),
            rule(
                "Kimi Delta Attention (delta rule, a decay a channel)",
                delta_rule,
                time,
                heads,
                head_dim,
                decay="channel",
            ),
            adding("linear attention", time, heads, head_dim, None),
            adding("RetNet, Mamba-2 (a decay a head)", time, heads, head_dim, "head"),
            adding("gated linear attention (a decay a channel)", time, heads, head_dim, "channel"),
        ],
    )


def mixture(time: int = 2048, heads: int = 4, head_dim: int = 64) -> Case:
    """What four memories, of which a token uses two and a shared one, cost more than one memory."""
    dim = heads * head_dim

    def layer(name: str, build: Callable[[], nn.Module]) -> Variant:
        return Variant(name, lambda: train(build(), 1, time, dim), time)

    return Case(
        "mixture_of_memories",
        "mom",
        f"Mixture-of-Memories, 4 memories, top 2, shared, against one memory: {time} tokens, width {dim}, "
        f"{heads} heads, K = V = {head_dim}; forward and backward of the layers",
        [
            layer("MixtureOfMemories", lambda: MixtureOfMemories(dim, num_heads=heads)),
            layer(PLAIN, lambda: GatedDeltaNet(dim, num_heads=heads)),
            layer("MixtureOfMemories, conv='input'", lambda: MixtureOfMemories(dim, num_heads=heads, conv="input")),
            layer(
                "GatedDeltaNet, values three times as wide",
                lambda: GatedDeltaNet(dim, num_heads=heads, value_dim=3 * head_dim),
            ),
        ],
        note="Every token is written and read three times. At most 3.6 times the cost of one memory is asked for, "
        "which is 0.278 of its tokens a second.",
        targets={PLAIN: 1 / 3.6},
    )


def step(build: Callable[[], nn.Module], dim: int, context: int) -> Variant:
    """One token after a context, without gradient, the state given away."""

    def run() -> Work:
        layer = build().eval()
        with torch.no_grad():
            _, state = layer(torch.randn(1, context, dim))
        token, held = torch.randn(1, 1, dim), [state]

        @torch.no_grad()
        def work() -> None:
            held[0] = layer(token, held[0], donate=True)[1]

        return work

    return Variant(f"step after {context} tokens", run, 1)


CASES = [
    against_peers(),
    family(),
    Case(
        "delta_rule_growth",
        "recurrence",
        "Gated delta rule, growth with length: 1 head, K = V = 64; forward and backward",
        [rule(f"ops.delta_rule, {time} tokens", delta_rule, time, 1, 64) for time in (4096, 8192, 16384, 32768, 65536)],
        axis="length",
    ),
    mixture(),
    Case(
        "mixture_of_memories_growth",
        "mom",
        "Mixture-of-Memories, growth with length: width 128; forward and backward",
        [
            mixer("MixtureOfMemories", lambda: MixtureOfMemories(128), time)
            for time in (4096, 8192, 16384, 32768, 65536)
        ],
        note="In a process that keeps what it frees, as the `memzoo` command does (docs/training.md): without, the "
        "tensors of the longest rows are made of fresh pages each time.",
        axis="length",
        has_memory=False,
        keeps_memory=True,
    ),
    Case(
        "mixture_of_memories_step",
        "mom",
        "Mixture-of-Memories, one step of decoding after a context: width 256, 4 heads",
        [step(lambda: MixtureOfMemories(256), 256, context) for context in (64, 1024, 16384)],
        axis="context",
        has_memory=False,
    ),
    Case(
        "gated_deltanet_step",
        "recurrence",
        "Gated DeltaNet, one step of decoding after a context: width 256, 4 heads",
        [step(lambda: GatedDeltaNet(256), 256, context) for context in (64, 1024, 16384)],
        axis="context",
        has_memory=False,
    ),
]
