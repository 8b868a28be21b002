"""Matrix products of a neural memory, forward and backward, counted on paper. Elementwise work counts as nothing."""

import itertools

from benchmark_cases.case import Product


def layer_products(batch: int, time: int, heads: int, **memory: int) -> tuple[Product, ...]:
    """Products of ``NeuralMemory``: the scan's and those of its q, k, v, gate and output projections."""
    dim, tokens = heads * memory["head_dim"], batch * time
    return (
        Product(1, tokens, dim, 3 * dim),
        Product(1, tokens, 3 * dim, dim),
        Product(1, 3 * dim, tokens, dim),
        Product(1, tokens, dim, dim, count=4),
        Product(1, dim, tokens, dim, count=2),
        *memory_products(batch, time, heads, **memory),
    )


def memory_products(
    batch: int, time: int, heads: int, *, head_dim: int, depth: int, expansion: int, chunk_size: int
) -> tuple[Product, ...]:
    """Products of ``ops.neural_memory`` with momentum.

    Forward, a token and head: keys 2 P, errors 2 (P - d_0 d_1), updates 4 P, reads 4 P, inside the chunk 2 C A, where
    P is the memory's weights and A the sum of its layers' widths in and out. The backward pass needs twice that.
    """
    rows, chunks, c = batch * heads, time // chunk_size, chunk_size
    widths = [head_dim, *[expansion * head_dim] * (depth - 1), head_dim]
    products = []
    for layer, (a, b) in enumerate(itertools.pairwise(widths)):
        inner = 1 if layer else 0  # layers whose error goes on to the one before
        products += [
            Product(rows, c, a, b, count=chunks * (3 + inner + 2)),  # keys, reads; backward of errors, updates
            Product(rows, c, b, a, count=chunks * (inner + 5)),  # errors; backward of keys, reads, updates
            Product(rows, a, c, b, count=chunks * (2 + inner + 3)),  # updates; backward of errors, keys, reads
            Product(rows, c, a, c, count=chunks),  # scores
            Product(rows, c, b, c, count=chunks),  # backward of the mixing
            Product(rows, c, c, b, count=2 * chunks),  # mixing; its backward
            Product(rows, c, c, a, count=2 * chunks),  # backward of the scores
        ]
    return tuple(products)


def context_products(
    batch: int, time: int, *, dim: int, heads: int, segment_size: int, persistent: int, hidden_dim: int, expansion: int
) -> tuple[Product, ...]:
    """Products of a block of ``TitansMAC`` with a memory of two layers, forward and backward."""
    tokens, segments, head_dim = batch * time, time // segment_size, dim // heads
    rows, keys, inner = batch * heads, persistent + 2 * segment_size, expansion * head_dim
    # For all tokens at once q, k, v of attention, the question, the gates of both answers, the last answer, the output;
    # for a segment the answer to the question, its keys and values, attention's output, q, k, v of the memory.
    return (
        *_linear(tokens, dim, dim, 8),
        *_linear(batch * segment_size, dim, dim, segments * 7),
        *_linear(tokens, dim, hidden_dim, 2),
        *_linear(tokens, hidden_dim, dim, 1),
        Product(rows, segment_size, head_dim, keys, count=segments * 3),  # scores, again backward; backward of mixing
        Product(rows, segment_size, keys, head_dim, count=segments * 2),  # mixing; backward of the queries
        Product(rows, keys, segment_size, head_dim, count=segments * 2),  # backward of keys and values
        Product(rows, segment_size, head_dim, inner, count=segments * 2),  # what is recalled; its backward
        Product(rows, segment_size, inner, head_dim, count=segments * 2),
        Product(rows, head_dim, segment_size, inner, count=segments),
        Product(rows, inner, segment_size, head_dim, count=segments),
        *memory_products(batch, time, heads, head_dim=head_dim, depth=2, expansion=expansion, chunk_size=segment_size),
    )


def _linear(tokens: int, width_in: int, width_out: int, count: int) -> tuple[Product, ...]:
    """Products of as many linear layers: forward, of their input's gradient, of their weight's."""
    return (
        Product(1, tokens, width_in, width_out, count=count),
        Product(1, tokens, width_out, width_in, count=count),
        Product(1, width_out, tokens, width_in, count=count),
    )


def online_products(batch: int, time: int, heads: int, *, head_dim: int, chunk_size: int) -> tuple[Product, ...]:
    """Products of ``ops.neural_memory_online`` with momentum; the triangular solve counts as nothing."""
    rows, chunks, c, d = batch * heads, time // chunk_size, chunk_size, head_dim
    every, wide = rows * chunks, 2 * d  # weights and momentum lie under one another
    return (
        Product(every, c, d, c, count=2 + 2),  # scores of keys and queries; backward of the mixing and of v
        Product(every, c, c, d, count=2 + 5),  # inverse v, mixing; their backward, that of both scores
        Product(every, c, c, wide, count=1 + 1),  # inverse keys; its backward
        Product(every, c, wide, c, count=1),  # backward of the system
        Product(every, c, wide, d, count=1),  # reads
        Product(every, c, d, wide, count=3),  # backward of reads, updates and carried errors
        Product(every, wide, c, d, count=1),  # backward of reads
        Product(rows, c, wide, d, count=chunks * (1 + 1)),  # carried errors; backward of updates
        Product(rows, wide, c, d, count=chunks * (1 + 1)),  # updates; backward of carried errors
    )


def delta_products(batch: int, time: int, heads: int, *, head_dim: int, chunk_size: int) -> tuple[Product, ...]:
    """Products of ``ops.delta_rule`` with keys and values of one width; the triangular inverse counts as nothing."""
    rows, chunks, c, d = batch * heads, time // chunk_size, chunk_size, head_dim
    every = rows * chunks
    return (
        Product(every, c, d, c, count=2 + 2),  # scores of keys and queries; backward of mixing and system
        Product(every, c, c, d, count=1 + 5),  # mixing; its backward, that of both scores
        Product(every, c, d, d, count=1 + 3),  # reads; backward of reads, of updates, of carried errors
        Product(every, d, c, d, count=1),  # backward of reads
        Product(rows, c, d, d, count=chunks * (1 + 1)),  # carried errors; backward of updates
        Product(rows, c, c, d, count=chunks * (1 + 1)),  # the system's errors; their backward
        Product(rows, d, c, d, count=chunks * (1 + 1)),  # updates; backward of carried errors
    )
