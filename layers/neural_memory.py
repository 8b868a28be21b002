"""Titans' neural memory: a small network per head, trained on the sequence while the sequence is read.

Behrouz, Zhong and Mirrokni, "Titans: Learning to Memorize at Test Time" (arXiv 2501.00663). Every token asks the
memory to map its key to its value and takes one step of gradient descent, with momentum (past surprise) and weight
decay (forgetting), at train and test time alike. Outer training differentiates through all of it.
"""

import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.heads import resolve_heads
from memzoo.layers.mixer import SequenceMixer, counters
from memzoo.layers.neural_memory_parts import (
    Gates,
    NeuralMemoryState,
    check_options,
    delay,
    gate_bias,
    gate_values,
    hidden_width,
    implicit_rate,
    is_online,
    join_columns,
    part_columns,
    part_tokens,
    seen_before,
    still_seen,
    unit,
    used_gates,
    where_read,
)
from memzoo.layers.norm import RMSNorm
from memzoo.layers.ops.elementwise import silu_product
from memzoo.layers.ops.memory_arguments import Weights, any_row
from memzoo.layers.ops.neural_memory import neural_memory_scan
from memzoo.layers.ops.neural_memory_online import neural_memory_online_scan
from memzoo.layers.ops.neural_memory_recall import recall
from memzoo.layers.registry import register_layer
from memzoo.layers.short_conv import ShortConv, ShortConvState
from memzoo.layers.state import MixerState
from memzoo.layers.trace import Trace

__all__ = ["NeuralMemory", "NeuralMemoryState"]


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
            paper. A token whose gradient overflows is then not written. Every group of ``gate_groups`` has its own.
        residual_norm: The memory is ``M(x) = x + LayerNorm(MLP(x))``, as in TTT (arXiv 2407.04620); its gain and bias
            are learned outside only.
        gate_groups: Groups of each head's value channels with gates of their own; ``head_dim`` gives every channel
            its own, the diag(alpha) of the paper's appendix C. Only of a linear memory (``memory_depth=1``), whose
            columns do not share gradients; the scan then costs as much as that many heads.
        lookahead_values: Store each value under the key of the token before (arXiv 2601.00671): the memory learns what
            follows.
        implicit_step: Solve each step's loss instead of following its gradient, theta / (1 + theta |k|^2), as in
            Longhorn (arXiv 2407.14207). Only of a linear memory with ``chunk_size=1``.
        objective_window: Tokens whose losses each step descends, its own the last, each times its share gamma: the
            Omega rule of ATLAS (arXiv 2505.23735). 1 is Titans, without gamma.
        checkpoint_chunks: Keep only the state before every so many chunks for the backward pass and compute the rest
            again; None keeps everything. Equal gradients, less memory, more time.
        backend: Of the memory's scan: "auto" or "torch"; "cpp" for a kernel on the CPU, which the convolution then has
            too; "triton" for one on a GPU, of a memory of two layers. See ``memzoo.layers.ops.neural_memory``.

    Shape:
        x: (batch, time, dim). mask, doc_ids: (batch, time). Returns (batch, time, dim) and ``NeuralMemoryState``.

    Raises:
        ValueError: A width does not divide, or an option is out of range.

    Reference:
        arXiv 2501.00663, sections 3.1, 3.2 and 4.4.

    Note:
        The paper gives no sizes, gate activations or initial weights. Ours: sigmoid gates, one a token and head, with
        alpha starting near 0.02, eta at 0.5, gamma at one over the window; learned initial weights M_0, drawn with
        variance 1 / fan-in and zero for a matrix; convolution width 4, output norm and gate as in Gated DeltaNet.
        Not twice differentiable, and closed to ``torch.func``: the backward pass of the scan is written out.
        Signals: ``theta``, ``eta``, ``alpha``, ``gamma``, ``surprise`` (norm of the error M(W_b; k) - v), each
        (batch, time, heads * gate_groups).
    """

    state_class = NeuralMemoryState
    no_weight_decay: tuple[str, ...] = ("gates", "initial_weights")

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
        residual_norm: bool = False,
        gate_groups: int = 1,
        lookahead_values: bool = False,
        implicit_step: bool = False,
        objective_window: int = 1,
        checkpoint_chunks: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        num_heads, head_dim = resolve_heads(dim, num_heads, head_dim)
        inner = num_heads * head_dim
        check_options(
            head_dim=head_dim,
            memory_depth=memory_depth,
            memory_expansion=memory_expansion,
            chunk_size=chunk_size,
            activation=activation,
            conv_width=conv_width,
            max_learning_rate=max_learning_rate,
            loss_scale=loss_scale,
            read=read,
            max_gradient_norm=max_gradient_norm,
            residual_norm=residual_norm,
            gate_groups=gate_groups,
            implicit_step=implicit_step,
            objective_window=objective_window,
            checkpoint_chunks=checkpoint_chunks,
            backend=backend,
        )
        self.num_heads, self.head_dim, self.gate_groups = num_heads, head_dim, gate_groups
        self.chunk_size, self.activation, self.read = chunk_size, activation, read
        self.momentum, self.forgetting, self.decay_to_init = momentum, forgetting, decay_to_init
        self.max_learning_rate = chunk_size**-0.5 if max_learning_rate is None else max_learning_rate
        self.loss_scale, self.max_gradient_norm = loss_scale, max_gradient_norm
        self.lookahead_values, self.implicit_step = lookahead_values, implicit_step
        self.objective_window, self.checkpoint_chunks, self.backend = objective_window, checkpoint_chunks, backend
        self.is_online = is_online(chunk_size, memory_depth, max_gradient_norm, residual_norm, objective_window)
        widths = [head_dim, *[hidden_width(head_dim, memory_expansion)] * (memory_depth - 1), head_dim]
        self.query_key_value = nn.Linear(dim, 3 * inner, bias=False)
        self.num_gates = num_heads * gate_groups
        self._state_parts: dict[str, int] = dict(
            momentum=momentum, convolution=conv_width is not None, lookahead=lookahead_values,
            objective_window=objective_window, shares=self.num_gates * (objective_window > 1),
        )  # fmt: skip
        own = "cpp" if backend == "cpp" else "auto"
        self.conv = None if conv_width is None else ShortConv(3 * inner, width=conv_width, backend=own)
        self.gate_names = used_gates(momentum=momentum, forgetting=forgetting, window=objective_window)
        self.gates = nn.Linear(dim, len(self.gate_names) * self.num_gates)
        self.weight_shapes = [(num_heads, *pair) for pair in itertools.pairwise(widths)]
        self.initial_weights = nn.ParameterList(torch.empty(shape) for shape in self.weight_shapes)
        self.norm_gain = nn.Parameter(torch.empty(num_heads, head_dim)) if residual_norm else None
        if residual_norm:
            self.no_weight_decay += ("norm_gain", "norm_bias")
        self.norm_bias = nn.Parameter(torch.empty(num_heads, head_dim)) if residual_norm else None
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
        for name, bias in zip(self.gate_names, self.gates.bias.split(self.num_gates), strict=True):
            bias.fill_(gate_bias(name, self.objective_window))
        if self.norm_gain is not None and self.norm_bias is not None:
            nn.init.ones_(self.norm_gain)
            nn.init.zeros_(self.norm_bias)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> NeuralMemoryState:
        """Return the state of fresh rows: zeros, which ``mix`` reads as the learned initial weights."""
        like = self.initial_weights[0]
        device, dtype = device or like.device, dtype or like.dtype
        conv = None if self.conv is None else self.conv.initial_state(batch_size, device=device, dtype=dtype)
        return NeuralMemoryState.zeros(
            batch_size,
            self.weight_shapes,
            conv,
            momentum=self.momentum,
            lookahead=self.lookahead_values,
            past=self.objective_window - 1,
            num_gates=self.num_gates,
            device=device,
            dtype=torch.promote_types(dtype, torch.float32),
        )

    def mix(
        self, x: Tensor, state: MixerState | None, *, lengths: Tensor | None, trace: Trace | None, donate: bool
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Write and read the memory over rows that begin at the left; see ``SequenceMixer.mix``."""
        y, after = self.mix_heads(x, state, lengths=lengths, trace=trace)
        return self.output(y, x), after

    def mix_heads(
        self,
        x: Tensor,
        state: MixerState | None,
        *,
        lengths: Tensor | None,
        trace: Trace | None,
        position: int | None = None,
    ) -> tuple[Tensor, NeuralMemoryState]:
        """``mix`` without ``output``: what the heads read, (batch, time, heads, head_dim), and the new state.

        A caller that knows where all rows stand says so with ``position``, the tokens that each has read, if it is to
        read any now. At the border of a chunk that saves the layout for rows that stand anywhere.
        """
        own = cast(NeuralMemoryState | None, state)
        if own is not None:
            own.check(self.weight_shapes, **self._state_parts)
        _, after, document = counters(state, x, lengths)
        q, k, v, conv = self._project(x, None if own is None else own.conv, lengths)
        last_key: tuple[Tensor, ...] = ()
        if self.lookahead_values:
            k, last = delay(k, None if own is None else own.last_key[0], lengths)
            last_key = (last.to(torch.promote_types(last.dtype, torch.float32)),)
        gates = gate_values(self.gates, x, self.gate_names, self.max_learning_rate)
        if self.implicit_step:
            gates = Gates(implicit_rate(gates.theta, k, self.loss_scale, self.gate_groups), *gates[1:])
        y, weights, momentum, base = self._scan(q, k, v, gates, own, lengths, trace, position)
        recent = still_seen(k, v, gates.gamma, own, lengths, self.objective_window)
        if trace is not None:
            for name, gate in zip(Gates._fields, gates, strict=True):
                if gate is not None:
                    trace.signal(name, gate)
        return y, NeuralMemoryState(after, document, weights, momentum, base, conv, last_key, recent)

    def _scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates,
        state: NeuralMemoryState | None,
        lengths: Tensor | None,
        trace: Trace | None,
        position: int | None,
    ) -> tuple[Tensor, Weights, Weights, Weights]:
        """Write and read; return the reads, weights, momentum and gradient base."""
        groups = self.gate_groups
        begun = state is not None and position and lengths is None  # no row can be fresh
        weights = state.weights if state is not None and begun else self.current_weights(state, len(q))
        momentum = None if state is None else state.momentum
        anchor = self._initial(len(q)) if self.decay_to_init else None
        if groups > 1:
            (k, v), q = part_tokens(groups, k, v), q.repeat_interleave(groups, 2)
            weights = part_columns(weights, groups)
            momentum, anchor = (part and part_columns(part, groups) for part in (momentum, anchor))
        options: dict[str, Any] = dict(
            loss_scale=self.loss_scale,
            read=self.read,
            anchor=anchor,
            lengths=lengths,
            backend=self.backend,
            trace=trace,
        )
        if self.is_online and (q.shape[1] > 1 or torch.is_grad_enabled()):
            y, weights, momentum = neural_memory_online_scan(q, k, v, *gates[:3], weights, momentum, **options)
            base = weights
        else:
            y, weights, momentum, base = neural_memory_scan(
                q, k, v, *gates[:3], weights, momentum,
                chunk_size=self.chunk_size,
                activation=self.activation,
                position=state.position if state is not None and position is None else position or 0,
                base=None if state is None else part_columns(state.base, groups),
                max_gradient_norm=self.max_gradient_norm,
                norm=self._norm,
                window=self.objective_window,
                gamma=gates.gamma,
                recent=None if state is None else seen_before(state, groups),
                checkpoint_chunks=self.checkpoint_chunks,
                **options,
            )  # fmt: skip
            if position is not None and lengths is not None and state is not None:  # rows may have stopped elsewhere
                base = where_read(lengths, base, part_columns(state.base, groups))
        if groups > 1:
            y = y.unflatten(2, (-1, groups)).flatten(3)
            weights, momentum, base = (join_columns(part, groups) for part in (weights, momentum, base))
        return y, weights, momentum, base

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
        if not any_row(fresh):
            return state.weights
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
        return unit(projected.unflatten(-1, (self.num_heads, self.head_dim))), tail

    def recall(self, q: Tensor, weights: Weights) -> Tensor:
        """Ask the memory, write nothing: M(weights; q), (batch, time, heads, head_dim) for queries of that shape.

        Computed in at least float32, like the memory that is written.
        """
        return recall(q, weights, self.activation, self._norm)

    def output(self, y: Tensor, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Turn what the heads read for the tokens ``x`` into (batch, time, dim): norm, gate, projection.

        ``gate`` is ``output_gate(x)``, where the caller has it already.
        """
        y = y.flatten(2).to(x.dtype)
        if self.output_norm is not None:
            y = self.output_norm(y)
        if self.output_gate is not None:
            y = silu_product(self.output_gate(x) if gate is None else gate, y)
        return cast(Tensor, self.out(y))

    @property
    def _norm(self) -> tuple[Tensor, Tensor] | None:
        return None if self.norm_gain is None or self.norm_bias is None else (self.norm_gain, self.norm_bias)

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
        query_key, v = projected.unflatten(-1, (3, self.num_heads, self.head_dim)).split((2, 1), 2)
        q, k = unit(query_key).unbind(2)
        return q, k, v.squeeze(2), tail


@register_layer("neural_memory", "mixer")
def _neural_memory(dim: int, **overrides: object) -> NeuralMemory:
    return NeuralMemory(dim, **{"num_heads": 2, "chunk_size": 4} | overrides)  # type: ignore[arg-type]
