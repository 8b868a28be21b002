"""What graph memory cells let be looked at: how slots are used, how edges spread, where tokens go.

All of it follows from the routing that a forward pass has anyway and from the parameters.
"""

from torch import Tensor

from memzoo.layers.graph_memory_measures import (
    coverage,
    effective_number,
    gini,
    mean_of_real,
    move_counts,
    mutual_information,
    off_diagonal_cosines,
    row_entropy,
    soft_moves,
)
from memzoo.layers.ops.graph_memory import GraphRouting, GraphTables
from memzoo.layers.trace import Trace


def report_signals(
    trace: Trace,
    *,
    routing: GraphRouting,
    tables: GraphTables,
    centroids: Tensor,
    usage: Tensor,
    gate: Tensor,
    momentum: Tensor,
    temperature: Tensor,
    movement: Tensor,
    mask: Tensor | None = None,
    dead_usage: float = 1e-3,
) -> None:
    """Report everything worth looking at of one forward pass of a cell.

    Of every token, masked ones too: ``similarity, source, prior, target``, each (batch, time, S), ``source_centre,
    target_centre, movement``, each (batch, time, d), and ``source_entropy, target_entropy`` (batch, time).

    Of the text, its real tokens: ``soft_moves`` (S, S), the mean of source times target; ``batch_effective``, how many
    sources are used softly; ``mutual_information``, the nats that the source says about its token. By every token's
    likeliest slots: ``moves`` (S, S), the number of tokens by source and target; ``argmax_effective, argmax_gini``, how
    many sources are used and how unevenly; ``self_route``, the share of tokens that stay. Without a real token they
    are nan, and ``moves`` is zero.

    Of the cell: ``slots`` (S, d), C'; ``edges`` (S, S), Ebar; ``usage`` (S,); ``usage_effective, dead, centroid_cosine,
    coverage, edge_entropy, edge_peak, edge_cosine, gate, momentum, temperature``.

    Args:
        trace: Where to.
        routing: Of the tokens.
        tables: Of the parameters.
        centroids: As they are stored, before their norm.
        usage: Running mean of the sources.
        gate: Sigmoid of g, which scales what the cell adds.
        momentum: Sigmoid of omega.
        temperature: Of the sources.
        movement: Target centre minus source centre.
        mask: True at real tokens; all are without one.
        dead_usage: A slot that is used less is dead.

    Shape:
        centroids: (S, d). usage: (S,). gate: () or (d,). momentum, temperature: (). movement: (batch, time, d).
        mask: (batch, time), bool.
    """
    for name in ("similarity", "source", "prior", "target"):
        trace.signal(name, getattr(routing, name))
    trace.signal("source_entropy", row_entropy(routing.source))
    trace.signal("target_entropy", row_entropy(routing.target))
    source_centre = routing.source @ tables.centroids
    trace.signal("source_centre", source_centre)
    trace.signal("target_centre", source_centre + movement)
    trace.signal("movement", movement)
    _report_text(trace, routing.source, routing.target, mask)
    trace.signal("slots", tables.centroids)
    trace.signal("edges", tables.transitions)
    trace.signal("usage", usage.clone())  # a buffer, as it is now
    trace.signal("usage_effective", effective_number(usage))
    trace.signal("dead", (usage < dead_usage).sum())
    trace.signal("centroid_cosine", off_diagonal_cosines(centroids).mean())
    trace.signal("coverage", coverage(centroids))
    trace.signal("edge_entropy", row_entropy(tables.transitions).mean())
    trace.signal("edge_peak", tables.transitions.amax(-1).mean())
    trace.signal("edge_cosine", off_diagonal_cosines(tables.transitions).mean())
    trace.signal("gate", gate)
    trace.signal("momentum", momentum)
    trace.signal("temperature", temperature.clone())


def _report_text(trace: Trace, source: Tensor, target: Tensor, mask: Tensor | None) -> None:
    moves = move_counts(source, target, mask)
    chosen = moves.sum(1).to(source)
    trace.signal("moves", moves)
    trace.signal("soft_moves", soft_moves(source, target, mask))
    trace.signal("batch_effective", effective_number(mean_of_real(source, mask)))
    trace.signal("mutual_information", mutual_information(source, mask))
    trace.signal("argmax_effective", effective_number(chosen))
    trace.signal("argmax_gini", gini(chosen))
    trace.signal("self_route", moves.diagonal().sum() / chosen.sum())
