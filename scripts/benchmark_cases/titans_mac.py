"""Benchmarks of Titans MAC as a language model against titans-pytorch's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark_cases.case import Case, Product, Variant, Work, missing
from benchmark_cases.neural_memory import unit_keys
from benchmark_cases.products import context_products
from memzoo.arch.compiled_step import CompiledStep, check_compiler
from memzoo.arch.titans_mac import TitansMAC
from memzoo.layers.ops import cpp_library

OURS = "memzoo TitansMAC (per-token gates, conv, retrieval)"
IN_CPP = "memzoo TitansMAC, memory in C++"
RECOMPUTED = "memzoo TitansMAC, checkpoint_blocks={}"
COMPILED = "memzoo TitansMAC, CompiledStep"
MOVING = "titans-pytorch 0.5.5, memory moves every segment (gates a chunk)"
MOVING_COMPILED = "titans-pytorch 0.5.5, memory moves every segment, torch.compile"
FINE = "titans-pytorch 0.5.5, gates for 4 tokens"
EXACT = "titans-pytorch 0.5.5, per-token gates (chunk 1)"
DEFAULT = "titans-pytorch 0.5.5, its defaults (base never moves, 4 streams)"

NOTE = """\
Equal: width, depth, heads of attention and memory, segments, persistent tokens, feed-forward, vocabulary, an untied
head, the memory MLP, momentum, forgetting, base moved once a segment, no residual norm in the memory, unit keys and
SiLU projections. Different, since titans-pytorch has no option for it: its retrieved memory is added to the residual
stream before attention, where ours puts it into the context, so that a query sees up to 2 segments + N_p keys (there
1 segment + N_p), and reads the memory once more behind attention; ours convolves q, k and v and writes with gates of
every token (there the mean of a segment, read from its end on; with chunk 1 gates of every token); its memory's
activation is GELU, its persistent tokens are keys and values, it adds axial positions and mixes the first block's
attention values into later ones; "its defaults" also has four residual streams; its training script has gates for 4
tokens."""


@dataclass(frozen=True)
class Setting:
    """Sizes that both sides share."""

    vocab_size: int = 256
    dim: int = 256
    depth: int = 4
    num_heads: int = 4
    segment_size: int = 64
    num_persistent_tokens: int = 16
    hidden_dim: int = 704

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.num_heads

    def products(self, batch: int, time: int) -> tuple[Product, ...]:
        """Return the matrix products of a training step of ours."""
        block = context_products(
            batch,
            time,
            dim=self.dim,
            heads=self.num_heads,
            segment_size=self.segment_size,
            persistent=self.num_persistent_tokens,
            hidden_dim=self.hidden_dim,
            expansion=2,
        )
        head = Product(1, batch * time, self.dim, self.vocab_size, count=3)
        return (*block * self.depth, head)

    def weight_bytes(self) -> int:
        """Return the size of the weights of ours, in float32."""
        with torch.device("meta"):
            return 4 * sum(p.numel() for p in self.ours().parameters())

    def ours(self, *, checkpoint_blocks: bool | int = False, backend: str = "auto") -> TitansMAC:
        """Return our model."""
        return TitansMAC(
            self.vocab_size,
            self.dim,
            self.depth,
            segment_size=self.segment_size,
            num_persistent_tokens=self.num_persistent_tokens,
            num_heads=self.num_heads,
            memory={"memory_depth": 2, "memory_expansion": 2.0, "chunk_size": self.segment_size, "backend": backend},
            hidden_dim=self.hidden_dim,
            tie_embeddings=False,
            checkpoint_blocks=checkpoint_blocks,
        )

    def peer(self, *, chunk: int | None = None, moves: bool = True, streams: int = 1) -> nn.Module:
        """Return titans-pytorch's: memory gates a ``chunk`` of tokens, a base that ``moves`` every segment."""
        from titans_pytorch import MemoryAsContextTransformer, MemoryMLP

        model = MemoryAsContextTransformer(
            num_tokens=self.vocab_size,
            dim=self.dim,
            depth=self.depth,
            segment_len=self.segment_size,
            neural_memory_segment_len=chunk or self.segment_size,
            neural_memory_batch_size=self.segment_size if moves else None,
            num_persist_mem_tokens=self.num_persistent_tokens,
            num_residual_streams=streams,
            heads=self.num_heads,
            dim_head=self.head_dim,
            ff_mult=self.hidden_dim / self.dim * 1.5,
            neural_memory_model=MemoryMLP(self.head_dim, depth=2, expansion_factor=2.0),
            neural_memory_kwargs=dict(
                heads=self.num_heads,
                dim_head=self.head_dim,
                mem_model_norm_add_residual=False,
                momentum=True,
                activation=nn.SiLU(),
                qk_rmsnorm=True,
                default_step_transform_max_lr=self.segment_size**-0.5,
                store_memory_loss_fn=lambda predicted, target: (predicted - target).pow(2).sum(-1),
            ),
        )
        return unit_keys(model)


def no_compiler() -> str | None:
    """Say that nothing can be compiled here, if so."""
    try:
        check_compiler()
    except ValueError:
        return "there is no C++ compiler"
    return None


def _train(model: nn.Module, loss: Callable[[Tensor], Tensor], vocab_size: int, batch: int, time: int) -> Work:
    """Forward and backward of a loss on batch x (time + 1) tokens."""
    tokens = torch.randint(vocab_size, (batch, time + 1))

    def work() -> None:
        model.zero_grad(set_to_none=True)
        loss(tokens).backward()

    return work


def train_ours(setting: Setting, batch: int, time: int, **options: Any) -> Work:
    """One training step, the optimiser's part left out."""
    model = setting.ours(**options)

    def loss(tokens: Tensor) -> Tensor:
        logits, _ = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return _train(model, loss, setting.vocab_size, batch, time)


def train_peer(setting: Setting, batch: int, time: int, **options: Any) -> Work:
    """The same of the peer."""
    model = setting.peer(**options)
    return _train(model, lambda tokens: model(tokens, return_loss=True), setting.vocab_size, batch, time)


def decode_ours(setting: Setting, prompt: int, new: int, *, backend: str | None = None) -> Work:
    """Sample ``new`` tokens after a prompt that was read before, with a compiled step if a ``backend`` is named."""
    model = setting.ours().eval()
    step = None if backend is None else CompiledStep(model, backend=backend)
    tokens = torch.randint(setting.vocab_size, (1, prompt))
    with torch.no_grad():
        _, state = model.prefill(tokens[:, :-1])

    def work() -> list[Tensor]:
        return list(model.generate(tokens[:, -1:], new, state=state, step=step))

    return work


def decode_peer(setting: Setting, prompt: int, new: int, *, backend: str | None = None, **options: Any) -> Work:
    """The same by the loop of the peer's ``sample(use_cache=True)``, without its progress bar and token filter."""
    from titans_pytorch.mac_transformer import gumbel_sample

    model = setting.peer(**options).eval()
    tokens = torch.randint(setting.vocab_size, (1, prompt))
    positions = model.axial_pos_emb
    outer = positions.maybe_derive_outer_dim(prompt + new, (model.neural_memory_segment_len,))
    with torch.no_grad():
        factorized = positions(outer, return_factorized=True)
        first, cache = model(tokens, return_cache=True)
    read = model if backend is None else torch.compile(model, backend=backend)

    @torch.no_grad()
    def work() -> Tensor:
        out, logits, state = tokens, first, cache
        for _ in range(new):
            out = torch.cat((out, gumbel_sample(logits[:, -1])), -1)
            logits, state = read(out, cache=state, return_cache=True, factorized_pos_emb=factorized)
        return out[:, prompt:]

    return work


def cases(
    setting: Setting | None = None,
    *,
    batch: int = 2,
    time: int = 1024,
    prompt: int = 256,
    new: int = 64,
    backend: str = "inductor",
) -> list[Case]:
    """Training and decoding, side by side."""
    s = setting or Setting()
    absent = missing("titans_pytorch")
    wiring = {MOVING: {}, DEFAULT: dict(moves=False, streams=4)}
    sizes = (
        f"width {s.dim}, {s.depth} blocks, {s.num_heads} heads, segments of {s.segment_size}, "
        f"{s.num_persistent_tokens} persistent tokens, memory MLP of two layers, h = 2d"
    )

    def trained(name: str, tokens: int, **options: Any) -> Variant:
        return Variant(name, lambda: train_peer(s, batch, tokens, **options), batch * tokens, missing=absent)

    def recomputed(blocks: bool | int) -> Variant:
        name = RECOMPUTED.format(blocks)
        return Variant(name, lambda: train_ours(s, batch, time, checkpoint_blocks=blocks), batch * time)

    def decoded(name: str, **options: Any) -> Variant:
        return Variant(name, lambda: decode_peer(s, prompt, new, **options), new, missing=absent)

    sequence = f"{sizes}; {new} tokens after {prompt}, one sequence"
    products = s.products(batch, time)
    floor = f"\nThe products of a step of ours are {sum(p.flops for p in products) / 1e9:.0f} GFLOP."
    few = 2 * s.segment_size  # it keeps weights for every token: time and memory are those of its tokens
    short = f"{EXACT}, {few} tokens"
    fine = f"{FINE}, {2 * few} tokens"
    return [
        Case(
            "titans_mac_train",
            "mac",
            f"Titans MAC, training: {sizes}; batch {batch}, {time} tokens; forward and backward of the loss",
            [
                Variant(
                    IN_CPP,
                    lambda: train_ours(s, batch, time, backend="cpp"),
                    batch * time,
                    products,
                    missing=cpp_library.obstacle(),
                ),
                Variant(OURS, lambda: train_ours(s, batch, time), batch * time, products),
                *(trained(name, time, **options) for name, options in wiring.items()),
                trained(fine, 2 * few, chunk=4),
                trained(short, few, chunk=1),
            ],
            note=f"{NOTE} In C++: memory={{'backend': 'cpp'}}.{floor}",
            targets={MOVING: 3.0, fine: 3.0, short: 3.0},
            most_memory={MOVING: 0.5, short: 0.5},
        ),
        Case(
            "titans_mac_train_memory",
            "mac",
            f"Titans MAC, training in less memory: the sizes above; batch {batch}, {time} tokens; forward and backward",
            [
                recomputed(2),
                recomputed(True),
                Variant(OURS, lambda: train_ours(s, batch, time), batch * time, products),
                trained(MOVING, time),
                trained(short, few, chunk=1),
            ],
            note="The models above. checkpoint_blocks=2 computes every second block again in the backward pass, True "
            "every block; the gradients are equal.",
            most_memory={MOVING: 0.5, short: 0.5},
        ),
        Case(
            "titans_mac_decode",
            "mac",
            f"Titans MAC, decoding: {sequence}",
            [
                Variant(OURS, lambda: decode_ours(s, prompt, new), new),
                *(decoded(name, **options) for name, options in wiring.items()),
                decoded(EXACT, chunk=1),
            ],
            note="The models above. Ours writes its memory with every token, titans-pytorch's at the end of a "
            "segment, with chunk 1 with every token. Reading the prompt is not timed; its length is a multiple of the "
            "segment, since titans-pytorch's cache loses the running segment after a longer prompt that is not. "
            f"A step of ours reads {s.weight_bytes() / 1e6:.0f} MB of weights.",
            targets={MOVING: 5.0, EXACT: 5.0},
            has_memory=False,
        ),
        Case(
            "titans_mac_decode_compiled",
            "mac",
            f"Titans MAC, decoding compiled: {sequence}",
            [
                Variant(COMPILED, lambda: decode_ours(s, prompt, new, backend=backend), new, missing=no_compiler()),
                Variant(OURS, lambda: decode_ours(s, prompt, new), new),
                decoded(MOVING),
                decoded(MOVING_COMPILED, backend=backend),
                decoded(EXACT, chunk=1),
            ],
            note="The same with a step that was compiled before. titans-pytorch has no step of fixed shapes: "
            "torch.compile takes its forward in pieces, compiles them again for every length of the segment, and "
            "leaves them as they are after eight of these.",
            targets={MOVING: 5.0, MOVING_COMPILED: 5.0, EXACT: 5.0},
            has_memory=False,
        ),
    ]


CASES = cases()
