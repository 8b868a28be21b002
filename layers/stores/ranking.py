"""The entries that answer a query best, exactly and the same for every store.

Inner products are defined in float64, one row at a time. A product of a matrix and a vector is faster, and rounds by
where a row lies in it: it chooses candidates, so many that its rounding cannot have lost any.
"""

import torch
from torch import Tensor

from memzoo.layers.stores.store import Entries


def best(keys: Tensor, query: Tensor, count: int) -> Tensor:
    """Return the rows with the ``count`` largest inner products, of equal ones the first, in rising order.

    Shape:
        keys: (rows, kv_heads, head_dim). query: (kv_heads, head_dim). Returns (at most count,).
    """
    products = (keys.double() * query.to("cpu", torch.double)).flatten(1).sum(1)
    return products.sort(descending=True, stable=True).indices[:count].sort().values


def candidates(products: Tensor, count: int, error: float) -> Tensor:
    """Return the rows that may be among the ``count`` best where every product is off by at most ``error``."""
    if len(products) <= count:
        return torch.arange(len(products), device=products.device)
    least = products.topk(count).values[-1]
    return (~(products < least - 2 * error)).nonzero()[:, 0]


def largest_norm(keys: Tensor) -> float:
    """Return the largest norm of keys, (rows, kv_heads, head_dim); infinite if one is no number."""
    return float(torch.linalg.vector_norm(keys.double().flatten(1), dim=1).max().nan_to_num(torch.inf))


def rounding(query: Tensor, largest: float, dtype: torch.dtype) -> float:
    """Bound the rounding of a query's inner products in a dtype with keys up to the norm ``largest``."""
    most = float(query.double().norm()) * largest
    limits = torch.finfo(dtype)
    return (query.numel() + 4) * limits.eps * most if most < limits.max else torch.inf  # a product may overflow


def search(parts: list[Entries], query: Tensor, count: int, largest: float) -> Entries:
    """Return the ``count`` best of entries in host memory.

    Args:
        parts: The entries, in the order of their positions.
        query: What they are to answer.
        count: How many to return at most.
        largest: No key's norm is larger.

    Shape:
        query: (kv_heads, head_dim).
    """
    flat = query.flatten().to(parts[0].keys)
    products = torch.cat([part.keys.flatten(1) @ flat for part in parts])
    index = candidates(products, count, rounding(query, largest, products.dtype))
    chosen, first = [], 0
    for part in parts:
        own = index[(index >= first) & (index < first + len(part))]
        chosen.append(part.select(own - first))
        first += len(part)
    found = Entries.join(chosen)
    return found.select(best(found.keys, query, count))
