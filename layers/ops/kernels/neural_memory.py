"""Triton kernel of a neural memory's scan, forward: a program a row, which goes through all of its chunks.

What ``memzoo.layers.ops.neural_memory_chunk`` says in dozens of operations, forward and backward, is a kernel each.
Notation is that module's, with W the weights at which the chunk's gradients are taken, U and S its carried blocks (U is
W minus the anchor, but where a first chunk was given a W of its own), each of two layers. The hidden layer is taken
``B`` units at a time, so that registers can hold most of what a program works on; errors and scores are sums over these
parts, and what needs such a sum waits for the next pass over them. Blocks, and what one pass leaves for the next, go
through global memory, from whose cache they come back.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from memzoo.layers.ops.kernels.parts import (
    activate,
    at_first,
    error_at_base,
    limit_factor,
    slope_of,
    squared_norms,
    tile,
)


@triton.jit(do_not_specialize=["num_chunks", "num_rows"])  # or other lengths and batches compile again
def scan_forward(
    q, k, v, mix, read, write, transition, base, anchor, last, states, y, error_norm, last_base, work,
    num_chunks, num_rows, state_stride, loss_scale, limit,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, B: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, HAS_BASE: tl.constexpr, HAS_ANCHOR: tl.constexpr, HAS_LIMIT: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Read into ``y`` and write, chunk after chunk.

    ``states`` holds a row's blocks one after the other, first and second layer in each: a chunk reads them
    ``state_stride`` elements behind those of the one before, and leaves its own as many further; with 0 the last alone
    are left. ``base`` is W of the first chunk, if it is given apart; ``last_base`` takes W of the row's chunk ``last``.
    ``work`` has room for (C, D + C) a row: d1 and the scores of the first layer times their table.
    """
    BLOCKS: tl.constexpr = 2 if HAS_MOMENTUM else 1
    SECOND: tl.constexpr = D * H
    SIZE: tl.constexpr = 2 * D * H
    row = tl.program_id(0).to(tl.int64)
    time = tl.arange(0, C)
    old = states + row * BLOCKS * SIZE
    fixed = anchor + row * SIZE
    given = base + row * SIZE
    to_base = last_base + row * SIZE
    errors = tile(work + row * C * (D + C), C, D, D)
    scores = tile(work + row * C * (D + C) + C * D, C, C, C)
    last_chunk = tl.load(last + row)
    later = num_rows * C  # from the coefficients of U to those of S

    for j in range(num_chunks):
        chunk = j * num_rows + row
        new = old + state_stride
        coefficients = j * num_rows * BLOCKS * C + row * C + time
        shares = transition + j * num_rows * BLOCKS * BLOCKS + row

        keys = k + chunk * C * D
        queries = tile(q + chunk * C * D, C, D, D)
        error = error_at_base(
            keys, v + chunk * C * D, old, given, fixed, j == 0, C, D, H, B, HAS_BASE, HAS_ANCHOR, ACTIVATION, PRECISION
        )
        keys = tile(keys, C, D, D)
        tl.store(error_norm + chunk * C + time, tl.sqrt(tl.sum(error * error, 1)))
        d1 = error * loss_scale
        if HAS_LIMIT:
            of_error, of_input = squared_norms(
                keys, d1, old, given, fixed, j == 0, D, H, B, HAS_BASE, HAS_ANCHOR, ACTIVATION, PRECISION
            )
            x0 = tl.load(keys)
            squared = tl.sum(x0 * x0, 1) * of_error + of_input * tl.sum(d1 * d1, 1)
            factor = limit_factor(squared, limit)[:, None]
            d1 = tl.where(factor > 0, d1 * factor, 0.0)  # and so d0, which is made of it
        tl.store(errors, d1)
        score = tl.dot(tl.load(queries), tl.trans(tl.load(keys)), input_precision=PRECISION)
        tl.store(scores, score * tl.load(tile(mix + chunk * C * C, C, C, C)))
        tl.debug_barrier()
        score = tl.zeros_like(score)
        answer = tl.zeros_like(error)
        for b in range(0, H, B):
            second = SECOND + b * D  # of the part, which begins at b in the first layer
            x0 = tl.load(keys)
            d1 = tl.load(errors)
            u1 = tl.load(tile(old + b, D, B, H))
            u2 = tl.load(tile(old + second, B, D, D))
            w1 = u1
            w2 = u2
            if HAS_ANCHOR:
                f1 = tl.load(tile(fixed + b, D, B, H))
                f2 = tl.load(tile(fixed + second, B, D, D))
                w1 += f1
                w2 += f2
            w1 = at_first(w1, given + b, j == 0, D, B, H, HAS_BASE)
            w2 = at_first(w2, given + second, j == 0, B, D, D, HAS_BASE)
            if j == last_chunk:
                tl.store(tile(to_base + b, D, B, H), w1)
                tl.store(tile(to_base + second, B, D, D), w2)

            # Keys forward, errors backward.
            z = tl.dot(x0, w1, input_precision=PRECISION)
            x1 = activate(z, ACTIVATION)
            d0 = tl.dot(d1, tl.trans(w2), input_precision=PRECISION) * slope_of(z, ACTIVATION)

            # Queries through the weights after each token.
            of_weights = tl.load(read + coefficients)[:, None]
            a0 = tl.load(queries)
            out = tl.dot(tl.load(scores), d0, input_precision=PRECISION)
            out += tl.dot(a0, u1, input_precision=PRECISION) * of_weights
            if HAS_MOMENTUM:
                s1 = tl.load(tile(old + SIZE + b, D, B, H))
                s2 = tl.load(tile(old + SIZE + second, B, D, D))
                of_momentum = tl.load(read + coefficients + later)[:, None]
                out += tl.dot(a0, s1, input_precision=PRECISION) * of_momentum
            if HAS_ANCHOR:
                out += tl.dot(a0, f1, input_precision=PRECISION)
            a1 = activate(out, ACTIVATION)
            score += tl.dot(a1, tl.trans(x1), input_precision=PRECISION)
            answer += tl.dot(a1, u2, input_precision=PRECISION) * of_weights
            if HAS_MOMENTUM:
                answer += tl.dot(a1, s2, input_precision=PRECISION) * of_momentum
            if HAS_ANCHOR:
                answer += tl.dot(a1, f2, input_precision=PRECISION)

            # The blocks after the chunk. They may lie where the old ones do, which other threads may still read.
            tl.debug_barrier()
            kept = tl.load(shares)
            written = tl.load(write + coefficients)[:, None]
            u1 = u1 * kept + tl.dot(tl.trans(x0), d0 * written, input_precision=PRECISION)
            u2 = u2 * kept + tl.dot(tl.trans(x1), d1 * written, input_precision=PRECISION)
            if HAS_MOMENTUM:
                share = tl.load(shares + num_rows)
                u1 += s1 * share
                u2 += s2 * share
                kept = tl.load(shares + 3 * num_rows)
                written = tl.load(write + coefficients + later)[:, None]
                s1 = s1 * kept + tl.dot(tl.trans(x0), d0 * written, input_precision=PRECISION)
                s2 = s2 * kept + tl.dot(tl.trans(x1), d1 * written, input_precision=PRECISION)
                tl.store(tile(new + SIZE + b, D, B, H), s1)
                tl.store(tile(new + SIZE + second, B, D, D), s2)
            tl.store(tile(new + b, D, B, H), u1)
            tl.store(tile(new + second, B, D, D), u2)
        score *= tl.load(tile(mix + chunk * C * C, C, C, C))
        answer += tl.dot(score, tl.load(errors), input_precision=PRECISION)
        tl.store(tile(y + chunk * C * D, C, D, D), answer)
        tl.debug_barrier()  # the next chunk reads what other threads stored
        old = new
