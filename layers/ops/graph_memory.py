"""Graph memory: every token moves one hop through a graph of slots (Graph Memory Transformer, arXiv 2604.23862).

A slot is a centroid, a row of C' (S, d); the edges E (S, S) are directed. Of a token x:

    similarity_k   cos(x, C'_k)
    source   w   = softmax_k( 1 / max(1 - similarity_k, floor) / temperature )      where it is
    prior    p   = w Ebar,  Ebar = softmax of E's rows without their diagonal       where the graph leads from there
    scores   a   = <W_Q x, W_K C'_k> / sqrt(n)                                      what the token asks for
    target   v   = softmax_k( p + a ),  or of log p + a                             where it goes
    movement     = v C' - w C'

What depends on the parameters alone, ``GraphTables``, is made once for all tokens. Where that is less work, queries and
keys meet there: with A = W_Q^T W_K C'^T / sqrt(n), one product of x with [unit rows of C' | A] gives similarities and
scores, with 4 S d operations a token in place of 2 S d + 2 d n + 2 S n. Another with C' gives the movement, with 2 S d.

Everything is computed in at least float32, whatever autocast says: similarities near 1 are divided by their distance to
it, and bfloat16 has steps of 1/256 there. TF32 has steps of 1/2048: where products of float32 may be rounded to it
(``torch.set_float32_matmul_precision``), sources of tokens near a centroid are off.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.ops.precision import no_autocast, wider

EdgeMode = Literal["prob", "logprob"]
SMALL = 1e-8  # added inside logarithms of probabilities, as in the official code


@dataclass(frozen=True)
class GraphTables:
    """What depends on the parameters alone.

    Attributes:
        centroids: (S, d), C'.
        projection: (d, 2 S), the unit rows of C', then what turns tokens into scores; or (d, S + n), then W_Q^T.
        keys: (n, S), what turns queries into scores; None in the first case.
        transitions: (S, S), Ebar: rows sum to one, the diagonal is zero.
    """

    centroids: Tensor
    projection: Tensor
    keys: Tensor | None
    transitions: Tensor


@dataclass(frozen=True)
class GraphRouting:
    """Where every token is and where it goes, each (batch, time, S).

    Attributes:
        similarity: Cosine of the token and every centroid.
        source: Probabilities of the slots that it is at.
        prior: Where the edges lead from there, probabilities.
        scores: What the token asks of every slot.
        target: Probabilities of the slots that it moves to.
    """

    similarity: Tensor
    source: Tensor
    prior: Tensor
    scores: Tensor
    target: Tensor


def graph_memory(
    x: Tensor,
    centroids: Tensor,
    edges: Tensor,
    query: Tensor,
    key: Tensor,
    temperature: Tensor | float,
    *,
    distance_floor: float = 0.01,
    edge_mode: EdgeMode = "prob",
    hops: int = 1,
) -> tuple[Tensor, GraphRouting]:
    """Move every token through the graph.

    Args:
        x: Tokens.
        centroids: Of the slots, normed (C').
        edges: Logits of the transitions, of which the diagonal plays no part.
        query: W_Q.
        key: W_K.
        temperature: Of the source.
        distance_floor: Least distance 1 - similarity.
        edge_mode: "prob" adds the prior to the scores as a probability, which moves the log-odds of two targets by at
            most 1; "logprob" adds its logarithm.
        hops: Steps along the edges.

    Shape:
        x: (batch, time, d). centroids: (S, d). edges: (S, S). query, key: (n, d). Returns the movement (batch, time, d)
        and the routing.

    Reference:
        The official code, src/gmt/model.py, ``GraphMemoryCell`` before its last norm.
    """
    tables = graph_tables(centroids, edges, query, key)
    routing = route(x, tables, temperature, distance_floor=distance_floor, edge_mode=edge_mode, hops=hops)
    return movement(routing, tables), routing


def graph_tables(centroids: Tensor, edges: Tensor, query: Tensor, key: Tensor) -> GraphTables:
    """Compute what depends on the parameters alone; shapes as in ``graph_memory``."""
    with no_autocast(centroids.device):
        centroids, edges, query, key = map(wider, (centroids, edges, query, key))
        unit = F.normalize(centroids, dim=-1)
        keys = (key @ centroids.mT) * len(query) ** -0.5
        diagonal = torch.eye(len(edges), dtype=torch.bool, device=edges.device)
        transitions = edges.masked_fill(diagonal, -torch.inf).softmax(-1)
        (num_slots, dim), navigation_dim = centroids.shape, len(query)
        if dim * num_slots <= navigation_dim * (dim + num_slots):
            return GraphTables(centroids, torch.cat((unit.mT, query.mT @ keys), dim=-1), None, transitions)
        return GraphTables(centroids, torch.cat((unit.mT, query.mT), dim=-1), keys, transitions)


def route(
    x: Tensor,
    tables: GraphTables,
    temperature: Tensor | float,
    *,
    distance_floor: float,
    edge_mode: EdgeMode,
    hops: int,
) -> GraphRouting:
    """Find every token's source and target; arguments and shapes as in ``graph_memory``."""
    with no_autocast(x.device):
        x = wider(x)
        inner, scores = (x @ tables.projection).tensor_split([len(tables.centroids)], dim=-1)
        if tables.keys is not None:
            scores = scores @ tables.keys
        # As F.normalize, but of S numbers a token instead of d.
        similarity = inner / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
        source = (1 / (1 - similarity).clamp_min(distance_floor) / temperature).softmax(-1)
        prior = source
        for _ in range(hops):
            prior = prior @ tables.transitions
        target = ((prior if edge_mode == "prob" else (prior + SMALL).log()) + scores).softmax(-1)
        return GraphRouting(similarity, source, prior, scores, target)


def movement(routing: GraphRouting, tables: GraphTables) -> Tensor:
    """Return target centre minus source centre, (batch, time, d)."""
    with no_autocast(routing.source.device):
        return (routing.target - routing.source) @ tables.centroids
