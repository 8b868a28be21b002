"""Locas and its baseline TempLoRA, one token and one slot at a time. Slow, and the definition of what is right.

Locas (arXiv 2602.05085), TempLoRA (arXiv 2401.11504). A feed-forward of a host reads x = A_t (d,) and looks up its m
slots; a memory of r slots g_j, k_j, v_j stands beside it, its vectors clipped in every forward pass:

    M_j = act(<g_j, x>) <k_j, x>        act(<k_j, x>) where nothing is gated
    FFN(x) = sum_j M_j v_j
    H = FFN(x) + tau S(x),   S(x) = sum_j M_j v_j of the memory's slots,   tau = mean_j |W_down[:, j]| / r

Rows are slots. What is computed keeps the dtype it is given: float64, to be the truth.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
Chunk = TypeVar("Chunk")


def clip(vector: Tensor) -> Tensor:
    """Shorten a vector (d,) to unit length, and leave a shorter one as it is: ``w / max(|w|, 1)``."""
    length: Tensor = vector.norm()
    return vector / length.clamp(min=1)


def slot_scale(down_weight: Tensor, rank: int) -> Tensor:
    """Return ``tau = 1/r 1/m sum_j |W_down[:, j]|`` of the host's (d, m) matrix, a scalar."""
    columns = down_weight.unbind(1)
    return torch.stack([column.norm() for column in columns]).sum() / len(columns) / rank


def hidden(
    x: Tensor,
    gate: Tensor | None,
    key: Tensor,
    activation: Activation,
    key_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """Return the activations of all slots at one token, ``M_j = act(<g_j, x> + c_j) (<k_j, x> + b_j)``.

    Without a gate ``M_j = act(<k_j, x> + b_j)``.

    Shape:
        x: (d,). gate, key: (slots, d). key_bias, gate_bias: (slots,). Returns (slots,).
    """
    up = _products(x, key, key_bias)
    return activation(up) if gate is None else activation(_products(x, gate, gate_bias)) * up


def feed_forward(
    x: Tensor,
    gate: Tensor | None,
    key: Tensor,
    value: Tensor,
    activation: Activation,
    key_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """Look up every token of one sequence: ``FFN(x) = sum_j M_j v_j``.

    Of a host the keys are ``W_up``, the values ``W_down.T``, and nothing is clipped.

    Shape:
        x: (time, d). gate, key, value: (slots, d). key_bias, gate_bias: (slots,). Returns (time, d).
    """
    rows = []
    for token in x:
        y = torch.zeros_like(token)
        for slot, v in zip(hidden(token, gate, key, activation, key_bias, gate_bias), value, strict=True):
            y = y + slot * v
        rows.append(y)
    return torch.stack(rows)


def side_feed_forward(
    x: Tensor,
    gate: Tensor | None,
    key: Tensor,
    value: Tensor,
    activation: Activation,
    tau: Tensor | float,
    key_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """Return what the memory adds, ``tau S(x)``, with every g_j, k_j and v_j clipped; biases are not.

    Shape:
        x: (batch, time, d). gate, key, value: (r, d), and biases (r,), of one memory for all sequences; (batch, r, d)
        and (batch, r) of one for each. Returns (batch, time, d).
    """
    rows = []
    for b, sequence in enumerate(x):
        g = None if gate is None else _slots(gate, b)
        biases = (bias if bias is None or bias.dim() == 1 else bias[b] for bias in (key_bias, gate_bias))
        rows.append(tau * feed_forward(sequence, g, _slots(key, b), _slots(value, b), activation, *biases))
    return torch.stack(rows)


def importance(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return ``alpha_j = 1/T sum_t |M_tj|``, T the number of real tokens (section 4.1, step 2).

    One memory for all sequences is given all of them; one for each is given its own.

    Shape:
        hidden: (..., m). mask: (...) booleans, true for real tokens. Returns (m,).
    """
    tokens = hidden.flatten(0, -2)
    real = range(len(tokens)) if mask is None else mask.flatten().nonzero().flatten().tolist()
    total = torch.zeros_like(tokens[0])
    for t in real:
        total = total + tokens[t].abs()
    return total / len(real)


def choose(importance: Tensor, rank: int, rule: str, down_weight: Tensor | None = None) -> Tensor:
    """Choose the slots to clone (section 4.1, step 3): of equal ones the lowest index first.

    ``"topk"`` takes the largest alpha_j, ``"bottomk"`` the smallest, ``"topk_contribution"`` the largest
    ``alpha_j |W_down[:, j]|``, which alone needs the host's (d, m) matrix.

    Shape:
        importance: (m,). Returns (rank,) int64, the first choice first.
    """
    scores = importance.tolist()
    if rule == "topk_contribution":
        assert down_weight is not None
        scores = [score * float(column.norm()) for score, column in zip(scores, down_weight.unbind(1), strict=True)]
    sign = {"topk": -1, "topk_contribution": -1, "bottomk": 1}[rule]
    order = sorted(range(len(scores)), key=lambda j: (sign * scores[j], j))
    return torch.tensor(order[:rank])


def clone(rows: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scale rows to unit length, and their biases with them: ``w / |w|, b / |w|`` (section 4.1, step 4, and 6).

    A row of zeros stays, and so does its bias.

    Shape:
        rows: (r, d). bias: (r,). Returns the same.
    """
    norms = [row.norm() if row.any() else torch.ones_like(row[0]) for row in rows]
    keys = torch.stack([row / norm for row, norm in zip(rows, norms, strict=True)])
    return keys, None if bias is None else torch.stack([b / norm for b, norm in zip(bias, norms, strict=True)])


def write(x: Sequence[Tensor], gradients: Sequence[Tensor], eps: float) -> tuple[list[Tensor], list[Tensor]]:
    """Return one slot for each token and layer (section 4.2).

        k = A_t / |A_t|,   v = eps Gr_t / sqrt(sum over all layers of |Gr_t|^2)

    The norm is joint over layers, so what layers write relative to each other is kept. Where there is nothing to scale,
    the vector is zero.

    Args:
        x: By layer, what the feed-forward reads.
        gradients: By layer, of the log-likelihood (minus those of the loss) with respect to its output.
        eps: Length of a token's values, all layers together.

    Shape:
        x[i], gradients[i]: (tokens, d). Returns keys and values, by layer, the same.
    """
    keys, values = [torch.zeros_like(layer) for layer in x], [torch.zeros_like(layer) for layer in gradients]
    for t in range(len(x[0])):
        norm = torch.stack([layer[t].square().sum() for layer in gradients]).sum().sqrt()
        for i, (layer, gradient) in enumerate(zip(x, gradients, strict=True)):
            if layer[t].any():
                keys[i][t] = layer[t] / layer[t].norm()
            if norm > 0:
                values[i][t] = eps * gradient[t] / norm
    return keys, values


def merged(
    up: Tensor,
    down: Tensor,
    key: Tensor,
    value: Tensor,
    tau: Tensor | float,
    *,
    gate: Tensor | None = None,
    memory_gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the host's matrices with the memory in them (section 6), vectors clipped.

        W_up' = [W_up; K],   W_down' = [W_down, tau V^T],   W_gate' = [W_gate; G]

    Biases of the slots go behind those of the host as they are.

    Shape:
        up, gate: (m, d). down: (d, m). key, value, memory_gate: (r, d). Returns (m + r, d), (d, m + r), and (m + r, d)
        or None.
    """
    if gate is not None:
        assert memory_gate is not None
        gate = torch.cat([gate, _clip_rows(memory_gate)])
    return torch.cat([up, _clip_rows(key)]), torch.cat([down, tau * _clip_rows(value).T], dim=1), gate


def nonlinear_svd(
    keys: Tensor, values: Tensor, count: int, *, threshold: float, both_signs: bool = False
) -> tuple[Tensor, Tensor]:
    """Compress a memory ``f(x) = sum_j relu(<k_j, x>) v_j`` (section 4.3).

        s_j = |k_j| |v_j|,   q_j = s_j k_j / |k_j|,   sum_j q_j q_j^T = P diag(lambda) P^T

    The keys become the ``count`` eigenvectors p_i of the largest eigenvalues, without those of at most ``threshold``
    times the largest, each with the sign that makes ``sum_j <p_i, q_j> >= 0``; the values become f(p_i). With
    ``both_signs`` all -p_i follow.

    Shape:
        keys, values: (r, d). Returns two of (n, d) with n <= count, or <= 2 count.
    """
    dim = keys.shape[1]
    moment, total = keys.new_zeros(dim, dim), keys.new_zeros(dim)
    for k, v in zip(keys, values, strict=True):
        if k.any():
            q = k.norm() * v.norm() * k / k.norm()
            moment, total = moment + torch.outer(q, q), total + q
    eigenvalues, eigenvectors = torch.linalg.eigh(moment)  # from the smallest
    probes = []
    for i in range(dim - 1, max(dim - 1 - count, -1), -1):
        if eigenvalues[i] > threshold * eigenvalues[-1]:
            p = eigenvectors[:, i]
            probes.append(p if p @ total >= 0 else -p)
    if both_signs:
        probes += [-p for p in probes]
    if not probes:
        return keys.new_zeros(0, dim), keys.new_zeros(0, dim)
    p = torch.stack(probes)
    return p, feed_forward(p, None, keys, values, torch.relu)


def low_rank(x: Tensor, W: Tensor, B: Tensor, A: Tensor, alpha: float) -> Tensor:
    """Return ``W x + alpha / r B A x``, what TempLoRA makes of a matrix (editing_siblings.md, section 3).

    Shape:
        x: (..., n_in). W: (n_out, n_in). B: (n_out, r). A: (r, n_in). Returns (..., n_out).
    """
    tokens = x.reshape(-1, x.shape[-1])
    y = torch.stack([W @ token + alpha / len(A) * (B @ (A @ token)) for token in tokens])
    return y.view(*x.shape[:-1], -1)


def stream(
    score: Callable[[list[Tensor] | None, Chunk], Tensor],
    update: Callable[[list[Tensor], Sequence[Tensor]], list[Tensor]],
    chunks: Iterable[Chunk],
    memorize: Callable[[Chunk], list[Tensor]],
    *,
    steps: int = 1,
) -> list[Tensor]:
    """Score a stream, each chunk before the memory learns from it (section 5).

        l_0 = score(none, x_0),   memory_1 = memorize(x_0)
        l_c = score(memory_c, x_c),   memory_(c+1) = memory_c after ``steps`` times update(memory, d score / d memory)

    Args:
        score: Loss of a chunk under a memory, or under none. A prefix is part of the chunk.
        update: One step of the optimiser, from the memory and its gradients; it keeps its own moments.
        chunks: Of one document, in order.
        memorize: Starts the memory from the first chunk.
        steps: For each chunk.

    Returns:
        The losses l_c.
    """
    losses: list[Tensor] = []
    memory: list[Tensor] | None = None
    for chunk in chunks:
        if memory is None:
            losses.append(score(None, chunk).detach())
            memory = memorize(chunk)
            continue
        for step in range(steps):
            leaves = [tensor.detach().requires_grad_() for tensor in memory]
            loss = score(leaves, chunk)
            if step == 0:
                losses.append(loss.detach())
            memory = update(leaves, torch.autograd.grad(loss, leaves))
    return losses


def _products(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    products = torch.stack([row @ x for row in rows])
    return products if bias is None else products + bias


def _clip_rows(rows: Tensor) -> Tensor:
    return torch.stack([clip(row) for row in rows])


def _slots(memory: Tensor, b: int) -> Tensor:
    """Return the clipped vectors that sequence b reads: its own, or those of all."""
    return _clip_rows(memory if memory.dim() == 2 else memory[b])
