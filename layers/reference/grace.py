"""GRACE, one entry of the codebook at a time. Slow, and the definition of what is right.

GRACE (arXiv 2211.11031). A codebook beside one layer holds entries (k_i, v_i, e_i, y_i): key, value, radius and label,
those of an entry always together. A query q is what the layer reads at one token; with i* the nearest key, of equally
near ones the latest:

    h = v_i* if |q - k_i*| <= e_i*, else layer(q)

    write, d = |q - k_i*|:
        no entry, or d > e_init + e_i*:  add (q, v, e_init, y)
        else y = y_i*:                   e_i* <- max(e_i*, d + r)
        else d / 2 - 1e-5 < r:           v_i*, y_i* <- v, y,  e_i* <- max(e_i*, d + r)
        else:                            add (q, v, d / 2, y),  e_i* <- d / 2 - 1e-5

r = |q| u eps is what rounding may move a query by, eps being that of its dtype, u = log2(d_in), or 3 in 16 bits; e_init
is at least r. The paper has r = 0.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

GAP = 1e-5  # between two radii that were split


@dataclass(frozen=True)
class Entry:
    """What is answered near a key.

    Attributes:
        key: (d_in,).
        value: (d_out,).
        radius: How near.
        label: What the edit asked for.
    """

    key: Tensor
    value: Tensor
    radius: float
    label: Any


def nearest(query: Tensor, entries: Sequence[Entry]) -> tuple[int, float]:
    """Return the entry nearest to a query (d_in,), of equally near ones the latest, and its distance.

    The latest, so that an edit of a query that was edited before takes effect: both keys are then the same.
    """
    distances = [float((query - entry.key).norm()) for entry in entries]
    best = min(range(len(entries)), key=lambda i: (distances[i], -i))
    return best, distances[best]


def look_up(query: Tensor, entries: Sequence[Entry]) -> int | None:
    """Return the entry whose value is read at a query (d_in,); None if the layer answers."""
    if not entries:
        return None
    index, distance = nearest(query, entries)
    return index if distance <= entries[index].radius else None


def read(x: Tensor, y: Tensor, positions: Sequence[int], entries: Sequence[Entry], kind: str = "prompt") -> Tensor:
    """Return what becomes of the layer's output, every sample by itself.

    Args:
        x: What the layer reads.
        y: What it returns.
        positions: Of the query in each sample, its last prompt token.
        entries: The codebook.
        kind: What a value takes the place of: "last", that token; "prompt", the tokens before it; "all".

    Shape:
        x: (samples, time, d_in). y: (samples, time, d_out). Returns the same.
    """
    out = y.clone()
    for sample, position in enumerate(positions):
        index = look_up(x[sample, position], entries)
        if index is None:
            continue
        tokens = {"last": [position], "prompt": range(position), "all": range(y.shape[1])}[kind]
        for token in tokens:
            out[sample, token] = entries[index].value
    return out


def write(query: Tensor, value: Tensor, label: Any, entries: Sequence[Entry], radius: float) -> tuple[list[Entry], int]:
    """Make room for an edit.

    Args:
        query: The key, if an entry is added.
        value: What its value starts from.
        label: What the edit asks for.
        entries: The codebook.
        radius: Of an entry with none near it, e_init.

    Shape:
        query: (d_in,). value: (d_out,).

    Returns:
        The codebook, and the number of the entry whose value is to be trained.
    """
    book = list(entries)
    units = 3.0 if torch.finfo(query.dtype).bits == 16 else max(math.log2(len(query)), 1.0)
    least = float(query.norm()) * units * torch.finfo(query.dtype).eps
    radius = max(radius, least)
    if not book:
        return [Entry(query, value, radius, label)], 0
    index, distance = nearest(query, book)
    near = book[index]
    if distance > radius + near.radius:
        return [*book, Entry(query, value, radius, label)], len(book)
    if label == near.label:
        book[index] = replace(near, radius=max(near.radius, distance + least))
        return book, index
    if distance / 2 - GAP < least:
        book[index] = replace(near, value=value, label=label, radius=max(near.radius, distance + least))
        return book, index
    book[index] = replace(near, radius=distance / 2 - GAP)
    return [*book, Entry(query, value, distance / 2, label)], len(book)


def train(value: Tensor, loss: Callable[[Tensor], Tensor], steps: int, lr: float) -> Tensor:
    """Return a value (d_out,) after some steps of Adam on the edit's loss, a function of the value."""
    leaf = value.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(leaf).backward()
        optimizer.step()
    return leaf.detach()


def stream(
    edits: Sequence[tuple[Tensor, Any, Callable[[Tensor], Tensor]]],
    layer: Callable[[Tensor], Tensor],
    *,
    radius: float,
    steps: int,
    lr: float,
) -> list[Entry]:
    """Learn edits one after another, each a query, a label and a loss of the value; values start from the layer's.

    An edit is written whether the model already answers it or not: who wants that skipped leaves it out.
    """
    book: list[Entry] = []
    for query, label, loss in edits:
        book, index = write(query, layer(query), label, book, radius)
        book[index] = replace(book[index], value=train(book[index].value, loss, steps, lr))
    return book
