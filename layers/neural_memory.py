"""Titans' neural memory: a small network per head, trained on the sequence while the sequence is read.

Behrouz, Zhong and Mirrokni, "Titans: Learning to Memorize at Test Time" (arXiv 2501.00663). Every token asks the
memory to map its key to its value and takes one step of gradient descent, with momentum (past surprise) and weight
decay (forgetting), at train and test time alike. Outer training differentiates through all of it.
"""

import itertools
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.heads import resolve_heads
from memzoo.layers.mixer import SequenceMixer, counters
from memzoo.layers.norm import RMSNorm
from memzoo.layers.ops.activations import ACTIVATIONS
from memzoo.layers.ops.neural_memory import Weights, neural_memory_scan
from memzoo.layers.ops.precision import no_autocast
from memzoo.layers.registry import register_layer
from memzoo.layers.short_conv import ShortConv, ShortConvState
from memzoo.layers.state import MixerState
from memzoo.layers.trace import Trace


@dataclass(frozen=True)
class NeuralMemoryState(MixerState):
    """The memory after the tokens read so far; its size does not depend on their number.

    Attributes:
        weights: W, one (batch, heads, d_in, d_out) a memory layer.
        momentum: S, past surprise, like ``weights``; () without momentum.
        base: W at the start of the running chunk, where gradients are taken, like ``weights``.
        conv: Tail of the short convolution; None without one.
    """

    weights: Weights
    momentum: Weights
    base: Weights
    conv: ShortConvState | None


class NeuralMemory(SequenceMixer):
    """Neural long-term memory (LMM): an MLP per head that learns key -> value while reading.

    With ``W`` the memory's weights, ``S`` its past surprise and ``W_b`` the weights at the start of the chunk:

        S_t = eta_t S_{t-1} - theta_t grad |M(W_b; k_t) - v_t|^2 / 2
        W_t = (1 - alpha_t) W_{t-1} + S_t
        y_t = M(W_t; q_t)

    Args:
        dim: Width of ``x`` and ``y``.
        num_heads: Memories side by side; ``dim / head_dim`` by default. One is the paper's literal form.
        head_dim: Width of each; ``dim / num_heads`` if that is given, else 64.
        memory_depth: Layers of the memory, L_M. One is a matrix.
        memory_expansion: Width of the memory's hidden layers over that of a head.
        chunk_size: Tokens whose gradients are taken at the same weights. Part of the model, not only of its speed.
        activation: Between the memory's layers: "silu", "gelu", "relu", "identity".
        momentum: Keep past surprise (eta). False is the paper's ablation.
        forgetting: Decay the memory (alpha). False is the paper's ablation.
        conv_width: Width of the causal depthwise convolution after the q, k, v projections; None for none.
        max_learning_rate: theta_max; ``chunk_size ** -0.5`` by default, since the steps of a chunk add up.
        loss_scale: Factor of the gradient: 1 for half the squared error (the paper's appendix), 2 for all of it.
        read: "post" reads after the token is written, "pre" before.
        output_gate: Gate the output with ``silu(x W_g)``.
        output_norm: RMS-normalise the concatenated heads before the gate.
        decay_to_init: Forget towards the initial memory, not towards zero, which is a dead point of a deep memory.
            Not in the paper.
        max_gradient_norm: Limit of the norm of each token's gradient, over all layers of a head's memory. Not in the
            paper.
        backend: Of the memory's scan: "auto" or "torch".

    Shape:
        x: (batch, time, dim). mask, doc_ids: (batch, time). Returns (batch, time, dim) and ``NeuralMemoryState``.

    Raises:
        ValueError: A width does not divide, or an option is out of range.

    Reference:
        arXiv 2501.00663, sections 3.1, 3.2 and 4.4.

    Note:
        The paper gives no sizes, gate activations or initial weights. Ours: sigmoid gates, one a token and head, with
        alpha starting near 0.02 and eta at 0.5; learned initial weights M_0, drawn with variance
        1 / fan-in and zero for a matrix; convolution width 4 as in Gated DeltaNet; output norm and gate likewise.
        Not twice differentiable, and closed to ``torch.func``: the backward pass of the scan is written out.
        Signals: ``theta``, ``eta``, ``alpha``, ``surprise`` (norm of the error M(W_b; k) - v), each
        (batch, time, heads).
    """

    state_class = NeuralMemoryState
    no_weight_decay = ("gates", "initial_weights")

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        memory_depth: int = 2,
        memory_expansion: float = 2.0,
        chunk_size: int = 64,
        activation: str = "silu",
        momentum: bool = True,
        forgetting: bool = True,
        conv_width: int | None = 4,
        max_learning_rate: float | None = None,
        loss_scale: float = 1.0,
        read: str = "post",
        output_gate: bool = True,
        output_norm: bool = True,
        decay_to_init: bool = False,
        max_gradient_norm: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        num_heads, head_dim = resolve_heads(dim, num_heads, head_dim)
        inner = num_heads * head_dim
        check_positive("memory_depth", memory_depth)
        check_positive("chunk_size", chunk_size)
        if conv_width is not None:
            check_positive("conv_width", conv_width, "it counts the current token; use None for no convolution")
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("read", read, ("post", "pre"))
        check_choice("backend", backend, ("auto", "torch"))
        for name, value in (
            ("max_learning_rate", max_learning_rate),
            ("loss_scale", loss_scale),
            ("max_gradient_norm", max_gradient_norm),
            ("memory_expansion", memory_expansion),
        ):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} is not positive and finite; use a finite value above 0")
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.chunk_size = chunk_size
        self.activation = activation
        self.momentum = momentum
        self.forgetting = forgetting
        self.max_learning_rate = chunk_size**-0.5 if max_learning_rate is None else max_learning_rate
        self.loss_scale = loss_scale
        self.read = read
        self.decay_to_init = decay_to_init
        self.max_gradient_norm = max_gradient_norm
        self.backend = backend

        hidden = round(memory_expansion * self.head_dim)
        if hidden < 1:
            raise ValueError(
                f"memory_expansion={memory_expansion} leaves no hidden unit of a head of {self.head_dim}; use more"
            )
        widths = [self.head_dim, *[hidden] * (memory_depth - 1), self.head_dim]
        self.query_key_value = nn.Linear(dim, 3 * inner, bias=False)
        self.conv = ShortConv(3 * inner, width=conv_width, activation="silu") if conv_width is not None else None
        self.gates = nn.Linear(dim, (1 + momentum + forgetting) * num_heads)  # theta, eta, alpha: those in use
        self.initial_weights = nn.ParameterList(
            torch.empty(num_heads, d_in, d_out) for d_in, d_out in itertools.pairwise(widths)
        )
        self.output_norm = RMSNorm(inner) if output_norm else None
        self.output_gate = nn.Linear(dim, inner, bias=False) if output_gate else None
        self.out = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial memory and set the gates' starting points."""
        for weight in self.initial_weights:
            # A matrix may start empty; a deeper memory of zeros would have no gradient, ever.
            std = 0.0 if len(self.initial_weights) == 1 else weight.shape[1] ** -0.5
            nn.init.normal_(weight, std=std)
        nn.init.zeros_(self.gates.bias)
        if self.forgetting:  # sigmoid(0) = 0.5 would forget everything within a few tokens
            self.gates.bias[-self.num_heads :] = -4.0

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> NeuralMemoryState:
        """Return the state of fresh rows: zeros, which ``mix`` reads as the learned initial weights."""
        like = self.initial_weights[0]
        device = like.device if device is None else torch.device(device)
        dtype = like.dtype if dtype is None else dtype
        counts = torch.zeros(batch_size, dtype=torch.long, device=device)
        kept = torch.promote_types(dtype, torch.float32)

        def zeros() -> Weights:
            return tuple(torch.zeros(batch_size, *w.shape, dtype=kept, device=device) for w in self.initial_weights)

        conv = None if self.conv is None else self.conv.initial_state(batch_size, device=device, dtype=dtype)
        return NeuralMemoryState(counts, counts.clone(), zeros(), zeros() if self.momentum else (), zeros(), conv)

    def mix(
        self,
        x: Tensor,
        state: MixerState | None,
        *,
        lengths: Tensor | None,
        trace: Trace | None,
        donate: bool,
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Write and read the memory over rows that begin at the left; see ``SequenceMixer.mix``."""
        own = cast(NeuralMemoryState | None, state)
        if own is not None:
            self._check_state(own)
        before, after, document = counters(state, x, lengths)
        q, k, v, conv = self._project(x, None if own is None else own.conv, lengths)
        theta, eta, alpha = self._gate_values(x)
        initial = self._initial(x.shape[0])
        y, weights, momentum, base = neural_memory_scan(
            q,
            k,
            v,
            theta,
            eta,
            alpha,
            self.current_weights(own, x.shape[0]),
            None if own is None else own.momentum,
            chunk_size=self.chunk_size,
            activation=self.activation,
            loss_scale=self.loss_scale,
            read=self.read,
            position=0 if own is None else before,
            base=None if own is None else own.base,
            anchor=initial if self.decay_to_init else None,
            max_gradient_norm=self.max_gradient_norm,
            lengths=lengths,
            backend=self.backend,
            trace=trace,
        )
        if trace is not None:
            for name, gate in (("theta", theta), ("eta", eta), ("alpha", alpha)):
                if gate is not None:
                    trace.signal(name, gate)
        return self.output(y, x), NeuralMemoryState(after, document, weights, momentum, base, conv)

    def current_weights(self, state: NeuralMemoryState | None, batch_size: int) -> Weights:
        """Return the memory that a token read now would see, one (batch, heads, d_in, d_out) a memory layer.

        Args:
            state: What a call returned; rows that have read nothing, and all if it is None, hold the learned M_0.
            batch_size: Rows.
        """
        initial = self._initial(batch_size)
        if state is None:
            return initial
        fresh = (state.position == 0).view(-1, 1, 1, 1)
        return tuple(torch.where(fresh, w0, w) for w0, w in zip(initial, state.weights, strict=True))

    def queries(
        self, x: Tensor, tail: ShortConvState | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, ShortConvState | None]:
        """Return the queries of a stream that is only read, and the state of its own convolution.

        Args:
            x: Tokens.
            tail: What the previous call on this stream returned; None at its start.
            lengths: Tokens that exist in each row, from the left; all by default.

        Shape:
            x: (batch, time, dim). Returns (batch, time, heads, head_dim), and None without a convolution.
        """
        inner = self.num_heads * self.head_dim
        projected = F.linear(x, self.query_key_value.weight[:inner])
        if self.conv is None:
            projected, tail = F.silu(projected), None
        else:
            projected, tail = self.conv(projected, tail, lengths=lengths, channels=slice(inner))
        return _unit(projected.unflatten(-1, (self.num_heads, self.head_dim))), tail

    def recall(self, q: Tensor, weights: Weights) -> Tensor:
        """Ask the memory, write nothing: M(weights; q), (batch, time, heads, head_dim) for queries of that shape.

        Computed in at least float32, like the memory that is written.
        """
        value = ACTIVATIONS[self.activation].value
        with no_autocast(q.device):
            y = q.transpose(1, 2).to(torch.promote_types(q.dtype, weights[0].dtype))
            for i, w in enumerate(weights):
                y = (value(y) if i else y) @ w
        return y.transpose(1, 2)

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        """Turn what the heads read for the tokens ``x`` into (batch, time, dim): norm, gate, projection."""
        y = y.flatten(2).to(x.dtype)
        if self.output_norm is not None:
            y = self.output_norm(y)
        if self.output_gate is not None:
            y = y * F.silu(self.output_gate(x))
        projected: Tensor = self.out(y)
        return projected

    def _initial(self, batch_size: int) -> Weights:
        return tuple(w.expand(batch_size, *w.shape) for w in self.initial_weights)

    def _project(
        self, x: Tensor, tail: ShortConvState | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, ShortConvState | None]:
        """Return queries and keys of unit length, values, and the convolution's state."""
        projected = self.query_key_value(x)
        if self.conv is None:
            projected, tail = F.silu(projected), None
        else:
            projected, tail = self.conv(projected, tail, lengths=lengths)
        q, k, v = projected.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        return _unit(q), _unit(k), v, tail

    def _gate_values(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return theta, eta, alpha, each (batch, time, heads), in at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with no_autocast(x.device):
            gates = F.linear(x.to(dtype), self.gates.weight.to(dtype), self.gates.bias.to(dtype))
        values = list(gates.sigmoid().split(self.num_heads, dim=-1))
        theta = values.pop(0) * self.max_learning_rate
        eta = values.pop(0) if self.momentum else None
        return theta, eta, values.pop(0) if self.forgetting else torch.zeros_like(theta)

    def _check_state(self, state: NeuralMemoryState) -> None:
        shapes = [w.shape[1:] for w in state.weights]
        own = [w.shape for w in self.initial_weights]
        options = (len(state.momentum) > 0, state.conv is not None) == (self.momentum, self.conv is not None)
        if shapes != own or not options:
            raise ValueError(
                f"state holds memories of {[tuple(s) for s in shapes]}, momentum={len(state.momentum) > 0}, "
                f"convolution={state.conv is not None}; this layer's are {[tuple(s) for s in own]}, {self.momentum}, "
                f"{self.conv is not None}: pass what its previous call returned, or None to start afresh"
            )


def _unit(x: Tensor) -> Tensor:
    """Scale to unit length. Below 1e-4, a norm that float16 still holds, shrink: zeros have a tame gradient."""
    return F.normalize(x, dim=-1, eps=1e-4)


@register_layer("neural_memory", "mixer")
def _neural_memory(dim: int, **overrides: object) -> NeuralMemory:
    return NeuralMemory(dim, **{"num_heads": 2, "chunk_size": 4} | overrides)  # type: ignore[arg-type]
