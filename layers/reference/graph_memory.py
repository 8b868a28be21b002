"""Graph memory, one token and one slot at a time. Slow, and the definition of what is right.

Graph Memory Transformer, "v7" (arXiv 2604.23862; the equations are those of its official code). A slot is a centroid
C'_k, a row of (S, d); E (S, S) holds the logits of the edges. Of every token x, for every slot k:

    similarity_k = <x, C'_k> / (|x| |C'_k|)
    source       = softmax_k( 1 / max(1 - similarity_k, floor) / temperature )     the nearer, the more it attracts
    Ebar_ik      = exp(E_ik) / sum_{j != i} exp(E_ij),  Ebar_ii = 0                a slot has no edge to itself
    prior_k      = sum_i source_i Ebar_ik                                          one hop; more are taken likewise
    scores_k     = <W_Q x, W_K C'_k> / sqrt(n)
    target       = softmax_k( prior_k + scores_k )                                 or of log(prior_k + 1e-8) + scores_k
    movement     = sum_k target_k C'_k - sum_k source_k C'_k
"""

import torch
from torch import Tensor

from memzoo.layers.ops.graph_memory import GraphRouting


def graph_memory(
    x: Tensor,
    centroids: Tensor,
    edges: Tensor,
    query: Tensor,
    key: Tensor,
    temperature: Tensor | float,
    *,
    distance_floor: float = 0.01,
    edge_mode: str = "prob",
    hops: int = 1,
) -> tuple[Tensor, GraphRouting]:
    """Move every token through the graph.

    Args:
        x: Tokens.
        centroids: Of the slots, normed (C').
        edges: E, of which the diagonal plays no part.
        query: W_Q.
        key: W_K.
        temperature: Of the source.
        distance_floor: Least distance 1 - similarity.
        edge_mode: "prob" adds the prior to the scores, "logprob" its logarithm.
        hops: Steps along the edges.

    Shape:
        x: (batch, time, d). centroids: (S, d). edges: (S, S). query, key: (n, d). Returns the movement (batch, time, d)
        and the routing, (batch, time, S) each; at least float32.
    """
    x, C, E, W_Q, W_K = (
        tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (x, centroids, edges, query, key)
    )
    Ebar = transition_probabilities(E)
    slots = range(len(C))

    def move(token: Tensor) -> tuple[Tensor, ...]:
        similarity = torch.stack([token @ C[k] / (length(token) * length(C[k])) for k in slots])
        source = softmax([1 / (1 - similarity[k]).clamp(min=distance_floor) / temperature for k in slots])
        prior = source
        for _ in range(hops):
            prior = torch.stack([sum_of([prior[i] * Ebar[i, k] for i in slots]) for k in slots])
        scores = torch.stack([(W_Q @ token) @ (W_K @ C[k]) / len(W_Q) ** 0.5 for k in slots])
        edge = prior if edge_mode == "prob" else torch.log(prior + 1e-8)
        target = softmax([edge[k] + scores[k] for k in slots])
        source_centre = sum_of([source[k] * C[k] for k in slots])
        target_centre = sum_of([target[k] * C[k] for k in slots])
        return target_centre - source_centre, similarity, source, prior, scores, target

    rows = [[move(token) for token in row] for row in x]
    movement, *routing = (
        torch.stack([torch.stack(list(over_time)) for over_time in over_rows])
        for over_rows in zip(*(zip(*row, strict=True) for row in rows), strict=True)
    )
    return movement, GraphRouting(*routing)


def transition_probabilities(edges: Tensor) -> Tensor:
    """Return Ebar: the softmax of every row of E without its diagonal, and zero there."""
    slots = range(len(edges))
    rows = []
    for i in slots:
        others = [j for j in slots if j != i]
        to_others = dict(zip(others, softmax([edges[i, j] for j in others]), strict=True))
        rows.append(torch.stack([to_others.get(j, torch.zeros_like(edges[i, i])) for j in slots]))
    return torch.stack(rows)


def softmax(logits: list[Tensor]) -> Tensor:
    """Return exp(logits) over their sum; every logit is shifted by the greatest, which changes nothing but overflow."""
    greatest = torch.stack(logits).detach().max()
    weights = [torch.exp(logit - greatest) for logit in logits]
    return torch.stack([weight / sum_of(weights) for weight in weights])


def length(vector: Tensor) -> Tensor:
    """Return the Euclidean norm of (d,), at least 1e-12: a vector of zeros has similarity 0 with everything."""
    return torch.sqrt((vector * vector).sum()).clamp(min=1e-12)


def sum_of(terms: list[Tensor]) -> Tensor:
    """Add up tensors of one shape."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
