"""Balance losses: what keeps a router from sending every token to the same few memories.

Switch Transformer (arXiv 2101.03961, equations 4-6) as Mixture-of-Memories uses it (arXiv 2502.13685), in the three
readings that its public code has. With p_n the router's probabilities of token n over M memories, F_m the share of
tokens whose top k hold memory m (over m they sum to k) and P_m the mean of p_nm:

    "layer"           M sum_m F_m P_m of every layer, averaged over the layers
    "pooled"          the same of the tokens of all layers together, as Mixtral; a layer that always takes one memory
                      goes unseen if the others take the others
    "layer_sequence"  M mean_b sum_m F_bm P_bm of every layer, averaged, with F and P of each sequence b and p replaced
                      by the renormalised weights of the top k: only what was chosen has a gradient, and for k = 1
                      nothing has

A uniform router costs k, one that always takes the same k memories M. F counts, so the gradient flows through P alone.
Tokens that do not exist are not passed.
"""

import torch
from torch import Tensor

from memzoo.layers.ops.precision import wider
from memzoo.layers.trace import Trace

BALANCES = ("layer", "pooled", "layer_sequence")


def report_balance(
    trace: Trace,
    balance: str,
    weight: float,
    probabilities: Tensor,
    indices: Tensor,
    row_of: Tensor,
    num_rows: int,
) -> None:
    """Add one layer's part of the balance loss of all layers, ``trace.losses["balance"]``.

    Args:
        trace: Where to.
        balance: One of ``BALANCES``.
        weight: Factor of the loss.
        probabilities: What the router gives every memory.
        indices: The memories of each token.
        row_of: The sequence of each token.
        num_rows: Number of sequences.

    Shape:
        probabilities: (tokens, M). indices: (tokens, k). row_of: (tokens,) in [0, num_rows).
    """
    if balance == "pooled":
        choices, mass, tokens = router_load(probabilities, indices)
        trace.pool("balance", (choices, weight * mass, tokens), load_balance)
    elif balance == "layer":
        trace.pool("balance", (weight * layer_balance(probabilities, indices),), _mean_of_layers)
    else:
        loss = layer_sequence_balance(probabilities, indices, row_of, num_rows)
        trace.pool("balance", (weight * loss,), _mean_of_sequences_and_layers)


def router_load(probabilities: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums over tokens: how often each memory was chosen (M,), its probability (M,), and their number ()."""
    mass = wider(probabilities).sum(0)
    choices = _count(indices.flatten(), len(mass))
    return choices.to(mass), mass, mass.new_full((), len(probabilities))


def load_balance(choices: Tensor, mass: Tensor, tokens: Tensor) -> Tensor:
    """Return M sum_m F_m P_m of the tokens of all layers.

    Shape:
        What ``router_load`` returns, stacked over layers: (layers, M), (layers, M), (layers,). Returns a scalar.
    """
    total = tokens.sum().clamp_min(1)
    return choices.shape[1] * (choices.sum(0) / total * mass.sum(0) / total).sum()


def layer_balance(probabilities: Tensor, indices: Tensor) -> Tensor:
    """Return M sum_m F_m P_m of one layer's probabilities (tokens, M) and choices (tokens, k)."""
    return load_balance(*(part[None] for part in router_load(probabilities, indices)))


def layer_sequence_balance(probabilities: Tensor, indices: Tensor, row_of: Tensor, num_rows: int) -> Tensor:
    """Return M mean_b sum_m F_bm P_bm of one layer, P of the renormalised weights of the top k.

    Sequences without tokens do not count.

    Shape:
        probabilities: (tokens, M). indices: (tokens, k). row_of: (tokens,) in [0, num_rows). Returns a scalar.
    """
    num_memories = probabilities.shape[1]
    chosen = wider(probabilities).gather(1, indices)
    weights = chosen / chosen.sum(1, keepdim=True)
    slots = (row_of[:, None] * num_memories + indices).flatten()
    mass = weights.new_zeros(num_rows * num_memories).index_add(0, slots, weights.flatten()).view(num_rows, -1)
    choices = _count(slots, mass.numel()).view_as(mass)
    tokens = _count(row_of, num_rows)
    per_token = 1 / tokens.clamp_min(1).to(mass)[:, None]
    losses = num_memories * (choices * per_token * mass * per_token).sum(1)
    return losses.sum() / (tokens > 0).sum().clamp_min(1)


# Two names for one mean: ``Trace.pool`` refuses to mix what is combined by different functions.


def _mean_of_layers(losses: Tensor) -> Tensor:
    return losses.mean()


def _mean_of_sequences_and_layers(losses: Tensor) -> Tensor:
    return losses.mean()


def _count(values: Tensor, size: int) -> Tensor:
    """Return how often each of 0 .. size - 1 occurs, without waiting for the device as bincount would."""
    return values.new_zeros(size).index_add_(0, values, torch.ones_like(values))
