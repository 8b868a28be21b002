"""Triton kernel of a neural memory's scan, backward; see ``neural_memory`` beside it for how it is laid out.

What the forward pass knew but the states is computed again. A chunk takes five passes over the hidden layer, each of
which leaves a sum that the next one needs whole: errors; scores; gradients of the second layer's reads; of the second
errors; and the keys'.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from memzoo.layers.ops.kernels.parts import (
    activate,
    add_to_base,
    at_first,
    base_of,
    bend_of,
    error_at_base,
    limit_factor,
    slope_of,
    squared_norms,
    tile,
)


@triton.jit(do_not_specialize=["num_chunks", "num_rows"])  # or other lengths and batches compile again
def scan_backward(
    q, k, v, mix, read, write, transition, base, anchor, last, states,
    d_y, d_last_base, d_q, d_k, d_v, d_mix, d_read, d_write, d_transition, d_base, d_anchor, d_states, work,
    num_chunks, num_rows, state_stride, loss_scale, limit,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, B: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, HAS_BASE: tl.constexpr, HAS_ANCHOR: tl.constexpr, HAS_LIMIT: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute every chunk again, last chunk first, and its gradients.

    ``states`` are those at the start of the last chunk; those of the ones before lie ``state_stride`` elements before
    each. ``d_states`` holds the gradients of the blocks after the last chunk, laid out likewise, and is left with those
    of the blocks before the first; ``d_base`` and ``d_anchor`` are added to.
    ``work`` has room for (C, 4 H + D + 2 C) a row: four parts of the hidden layer, d1, the scores of the first layer
    times their table, and the gradient of those of the second. Two of the parts change: e, then the gradient
    of z; the queries' ``out``, then the gradient of d0. The others are z and the gradient of x1.
    """
    BLOCKS: tl.constexpr = 2 if HAS_MOMENTUM else 1
    SECOND: tl.constexpr = D * H
    SIZE: tl.constexpr = 2 * D * H
    PART: tl.constexpr = C * H
    row = tl.program_id(0).to(tl.int64)
    time = tl.arange(0, C)
    old = states + row * BLOCKS * SIZE
    fixed = anchor + row * SIZE
    given = base + row * SIZE
    from_base = d_last_base + row * SIZE
    own_base = d_base + row * SIZE
    own_anchor = d_anchor + row * SIZE
    grad = d_states + row * BLOCKS * SIZE
    own_work = work + row * C * (4 * H + D + 2 * C)
    errors = tile(own_work + 4 * PART, C, D, D)
    scores = tile(own_work + 4 * PART + C * D, C, C, C)
    d_scores = tile(own_work + 4 * PART + C * D + C * C, C, C, C)
    last_chunk = tl.load(last + row)
    later = num_rows * C

    for step in range(num_chunks):
        j = num_chunks - 1 - step
        chunk = j * num_rows + row
        coefficients = j * num_rows * BLOCKS * C + row * C + time
        shares = j * num_rows * BLOCKS * BLOCKS + row
        of_weights = tl.load(read + coefficients)[:, None]
        written = tl.load(write + coefficients)[:, None]
        if HAS_MOMENTUM:
            of_momentum = tl.load(read + coefficients + later)[:, None]
            written_too = tl.load(write + coefficients + later)[:, None]
        queries = tile(q + chunk * C * D, C, D, D)
        answers = tile(d_y + chunk * C * D, C, D, D)
        table = tile(mix + chunk * C * C, C, C, C)

        # First: the errors. The chunk again, as in ``scan_forward``.
        keys = k + chunk * C * D
        error = error_at_base(
            keys, v + chunk * C * D, old, given, fixed, j == 0, C, D, H, B, HAS_BASE, HAS_ANCHOR, ACTIVATION, PRECISION
        )
        keys = tile(keys, C, D, D)
        d1 = error * loss_scale
        if HAS_LIMIT:
            of_error, of_input = squared_norms(
                keys, d1, old, given, fixed, j == 0, D, H, B, HAS_BASE, HAS_ANCHOR, ACTIVATION, PRECISION
            )
            x0 = tl.load(keys)
            of_key = tl.sum(x0 * x0, 1)
            of_last = tl.sum(d1 * d1, 1)
            squared = of_key * of_error + of_input * of_last
            factor = limit_factor(squared, limit)
            d1 = tl.where(factor[:, None] > 0, d1 * factor[:, None], 0.0)
        tl.store(errors, d1)

        # Second: the scores, and what the new blocks, transition old + x^T diag(write) d, make of the second errors.
        score0 = tl.dot(tl.load(queries), tl.trans(tl.load(keys)), input_precision=PRECISION)
        tl.store(scores, score0 * tl.load(table))
        tl.debug_barrier()
        score1 = tl.zeros_like(score0)
        d_d1 = tl.zeros_like(error)
        zeros = tl.zeros_like(tl.sum(error, 1))
        dots = zeros
        dots_too = zeros
        for b in range(0, H, B):
            second = SECOND + b * D  # of the part, which begins at b in the first layer
            x0 = tl.load(keys)
            a0 = tl.load(queries)
            d1 = tl.load(errors)
            u1 = tl.load(tile(old + b, D, B, H))
            w1 = u1
            if HAS_ANCHOR:
                f1 = tl.load(tile(fixed + b, D, B, H))
                w1 += f1
            w1 = at_first(w1, given + b, j == 0, D, B, H, HAS_BASE)
            w2 = base_of(old + second, given + second, fixed + second, j == 0, B, D, D, HAS_BASE, HAS_ANCHOR)
            z = tl.dot(x0, w1, input_precision=PRECISION)
            x1 = activate(z, ACTIVATION)
            e = tl.dot(d1, tl.trans(w2), input_precision=PRECISION)
            out = tl.dot(tl.load(scores), e * slope_of(z, ACTIVATION), input_precision=PRECISION)
            out += tl.dot(a0, u1, input_precision=PRECISION) * of_weights
            if HAS_MOMENTUM:
                s1 = tl.load(tile(old + SIZE + b, D, B, H))
                out += tl.dot(a0, s1, input_precision=PRECISION) * of_momentum
            if HAS_ANCHOR:
                out += tl.dot(a0, f1, input_precision=PRECISION)
            tl.store(tile(own_work + b, C, B, H), z)
            tl.store(tile(own_work + PART + b, C, B, H), e)
            tl.store(tile(own_work + 2 * PART + b, C, B, H), out)
            score1 += tl.dot(activate(out, ACTIVATION), tl.trans(x1), input_precision=PRECISION)
            product = tl.dot(x1, tl.load(tile(grad + second, B, D, D)), input_precision=PRECISION)
            dots += tl.sum(product * d1, 1)
            d_d1 += product * written
            if HAS_MOMENTUM:
                product = tl.dot(x1, tl.load(tile(grad + SIZE + second, B, D, D)), input_precision=PRECISION)
                dots_too += tl.sum(product * d1, 1)
                d_d1 += product * written_too
        tl.debug_barrier()

        # Third: the reads, out = diag(read) old + mixed d + a anchor, last layer first.
        d_answer = tl.load(answers)
        d_d1 += tl.dot(tl.trans(score1 * tl.load(table)), d_answer, input_precision=PRECISION)
        d_score = tl.dot(d_answer, tl.trans(tl.load(errors)), input_precision=PRECISION)
        tl.store(tile(d_mix + chunk * C * C, C, C, C), d_score * score1)
        tl.store(d_scores, d_score * tl.load(table))
        tl.debug_barrier()
        if HAS_LIMIT:
            d_factor = tl.sum(d_d1 * tl.load(errors), 1)
        tl.store(tile(d_v + chunk * C * D, C, D, D), d_d1)
        d_mixed = tl.zeros_like(d_score)
        d_a0 = tl.zeros_like(d_d1)
        d_x0 = tl.zeros_like(d_d1)
        read_dots = zeros
        read_dots_too = zeros
        from_u = tl.sum(zeros, 0)
        from_s = tl.sum(zeros, 0)
        of_s = tl.sum(zeros, 0)
        kept = tl.load(transition + shares)
        if HAS_MOMENTUM:
            share = tl.load(transition + shares + num_rows)
            kept_too = tl.load(transition + shares + 3 * num_rows)
        for b in range(0, H, B):
            second = SECOND + b * D
            z = tl.load(tile(own_work + b, C, B, H))
            e = tl.load(tile(own_work + PART + b, C, B, H))
            out = tl.load(tile(own_work + 2 * PART + b, C, B, H))
            x0 = tl.load(keys)
            a0 = tl.load(queries)
            d1 = tl.load(errors)
            d_answer = tl.load(answers)
            d_score = tl.load(d_scores)
            x1 = activate(z, ACTIVATION)
            slope = slope_of(z, ACTIVATION)
            d0 = e * slope
            a1 = activate(out, ACTIVATION)
            g1 = tl.load(tile(grad + b, D, B, H))
            g2 = tl.load(tile(grad + second, B, D, D))
            d_x1 = tl.dot(tl.trans(d_score), a1, input_precision=PRECISION)
            d_x1 += tl.dot(d1 * written, tl.trans(g2), input_precision=PRECISION)
            d_d0 = tl.dot(x0 * written, g1, input_precision=PRECISION)
            product = tl.dot(d0, tl.trans(g1), input_precision=PRECISION)
            dots += tl.sum(product * x0, 1)
            d_x0 += product * written

            u2 = tl.load(tile(old + second, B, D, D))
            product = tl.dot(d_answer, tl.trans(u2), input_precision=PRECISION)
            read_dots += tl.sum(product * a1, 1)
            d_a1 = tl.dot(d_score, x1, input_precision=PRECISION) + product * of_weights
            from_u += tl.sum(tl.sum(g2 * u2, 1), 0)
            if HAS_MOMENTUM:
                m1 = tl.load(tile(grad + SIZE + b, D, B, H))
                m2 = tl.load(tile(grad + SIZE + second, B, D, D))
                d_x1 += tl.dot(d1 * written_too, tl.trans(m2), input_precision=PRECISION)
                d_d0 += tl.dot(x0 * written_too, m1, input_precision=PRECISION)
                product = tl.dot(d0, tl.trans(m1), input_precision=PRECISION)
                dots_too += tl.sum(product * x0, 1)
                d_x0 += product * written_too

                s2 = tl.load(tile(old + SIZE + second, B, D, D))
                product = tl.dot(d_answer, tl.trans(s2), input_precision=PRECISION)
                read_dots_too += tl.sum(product * a1, 1)
                d_a1 += product * of_momentum
                from_s += tl.sum(tl.sum(g2 * s2, 1), 0)
                of_s += tl.sum(tl.sum(m2 * s2, 1), 0)
            if HAS_ANCHOR:
                f2 = tl.load(tile(fixed + second, B, D, D))
                d_a1 += tl.dot(d_answer, tl.trans(f2), input_precision=PRECISION)
            d_out = d_a1 * slope_of(out, ACTIVATION)

            u1 = tl.load(tile(old + b, D, B, H))
            product = tl.dot(d_out, tl.trans(u1), input_precision=PRECISION)
            read_dots += tl.sum(product * a0, 1)
            d_a0 += product * of_weights
            d_mixed += tl.dot(d_out, tl.trans(d0), input_precision=PRECISION)
            d_d0 += tl.dot(tl.trans(tl.load(scores)), d_out, input_precision=PRECISION)
            from_u += tl.sum(tl.sum(g1 * u1, 1), 0)
            if HAS_MOMENTUM:
                s1 = tl.load(tile(old + SIZE + b, D, B, H))
                product = tl.dot(d_out, tl.trans(s1), input_precision=PRECISION)
                read_dots_too += tl.sum(product * a0, 1)
                d_a0 += product * of_momentum
                from_s += tl.sum(tl.sum(g1 * s1, 1), 0)
                of_s += tl.sum(tl.sum(m1 * s1, 1), 0)
            if HAS_ANCHOR:
                f1 = tl.load(tile(fixed + b, D, B, H))
                d_a0 += tl.dot(d_out, tl.trans(f1), input_precision=PRECISION)

            if HAS_LIMIT:
                d_factor += tl.sum(d_d0 * d0, 1)
            tl.debug_barrier()
            tl.store(tile(own_work + 2 * PART + b, C, B, H), d_d0)
            tl.store(tile(own_work + 3 * PART + b, C, B, H), d_x1)
            if HAS_MOMENTUM:
                m1 = g1 * share + m1 * kept_too
                m2 = g2 * share + m2 * kept_too
                m1 += tl.dot(tl.trans(a0 * of_momentum), d_out, input_precision=PRECISION)
                m2 += tl.dot(tl.trans(a1 * of_momentum), d_answer, input_precision=PRECISION)
                tl.store(tile(grad + SIZE + b, D, B, H), m1)
                tl.store(tile(grad + SIZE + second, B, D, D), m2)
            g1 = g1 * kept + tl.dot(tl.trans(a0 * of_weights), d_out, input_precision=PRECISION)
            g2 = g2 * kept + tl.dot(tl.trans(a1 * of_weights), d_answer, input_precision=PRECISION)
            if HAS_ANCHOR:
                d_f1 = tl.dot(tl.trans(a0), d_out, input_precision=PRECISION)
                d_f2 = tl.dot(tl.trans(a1), d_answer, input_precision=PRECISION)
                d_f1 += tl.load(tile(own_anchor + b, D, B, H))
                d_f2 += tl.load(tile(own_anchor + second, B, D, D))
                tl.store(tile(own_anchor + b, D, B, H), d_f1)
                tl.store(tile(own_anchor + second, B, D, D), d_f2)
            tl.store(tile(grad + b, D, B, H), g1)
            tl.store(tile(grad + second, B, D, D), g2)
        tl.debug_barrier()
        d_score = d_mixed * tl.load(table)
        d_a0 += tl.dot(d_score, tl.load(keys), input_precision=PRECISION)
        d_x0 += tl.dot(tl.trans(d_score), tl.load(queries), input_precision=PRECISION)
        score0 = tl.dot(tl.load(queries), tl.trans(tl.load(keys)), input_precision=PRECISION)
        d_table = tile(d_mix + chunk * C * C, C, C, C)
        tl.store(d_table, tl.load(d_table) + d_mixed * score0)
        tl.store(tile(d_q + chunk * C * D, C, D, D), d_a0)
        tl.store(d_read + coefficients, read_dots)
        tl.store(d_write + coefficients, dots)
        tl.store(d_transition + shares, from_u)
        if HAS_MOMENTUM:
            tl.store(d_read + coefficients + later, read_dots_too)
            tl.store(d_write + coefficients + later, dots_too)
            tl.store(d_transition + shares + num_rows, from_s)
            tl.store(d_transition + shares + 2 * num_rows, 0.0)  # from U to S nothing flows
            tl.store(d_transition + shares + 3 * num_rows, of_s)

        # Fourth: the limit, then through e = d1 W2^T to the second errors.
        d1 = tl.load(errors)
        d_d1 = tl.load(tile(d_v + chunk * C * D, C, D, D))
        if HAS_LIMIT:  # d1 = factor raw, likewise d0; the factor is limit / norm where it acts
            inverse = tl.where(factor > 0, 1 / factor, 0.0)
            acts = (factor > 0) & (factor < 1)
            d_squared = -d_factor / squared  # twice that of the squared norm
            to_key = tl.where(acts, d_squared * of_error, 0.0)
            to_error = tl.where(acts, d_squared * of_key, 0.0)
            to_input = tl.where(acts, d_squared * of_last, 0.0)
            to_last = tl.where(acts, d_squared * of_input, 0.0)
            d1 *= inverse[:, None]
            d_d1 = d_d1 * factor[:, None] + d1 * to_last[:, None]
            d_x0 += tl.load(keys) * to_key[:, None]
        for b in range(0, H, B):
            second = SECOND + b * D
            z = tl.load(tile(own_work + b, C, B, H))
            e = tl.load(tile(own_work + PART + b, C, B, H))
            d_d0 = tl.load(tile(own_work + 2 * PART + b, C, B, H))
            d_x1 = tl.load(tile(own_work + 3 * PART + b, C, B, H))
            w2 = base_of(old + second, given + second, fixed + second, j == 0, B, D, D, HAS_BASE, HAS_ANCHOR)
            slope = slope_of(z, ACTIVATION)
            if HAS_LIMIT:
                e *= inverse[:, None]
                d_d0 = d_d0 * factor[:, None] + e * slope * to_error[:, None]
                d_x1 += activate(z, ACTIVATION) * to_input[:, None]
            d_e = d_d0 * slope
            d_d1 += tl.dot(d_e, w2, input_precision=PRECISION)
            h2 = tl.dot(tl.trans(d_e), d1, input_precision=PRECISION)
            tl.store(tile(own_work + PART + b, C, B, H), d_d0 * e * bend_of(z, ACTIVATION) + d_x1 * slope)
            add_to_base(
                h2, grad + second, own_base + second, own_anchor + second, j == 0, B, D, D, HAS_BASE, HAS_ANCHOR
            )
        d_d1 *= loss_scale
        tl.store(tile(d_v + chunk * C * D, C, D, D), d_d1)

        # Fifth: the keys.
        tl.debug_barrier()
        for b in range(0, H, B):
            second = SECOND + b * D
            x0 = tl.load(keys)
            d_d1 = tl.load(tile(d_v + chunk * C * D, C, D, D))
            w1 = base_of(old + b, given + b, fixed + b, j == 0, D, B, H, HAS_BASE, HAS_ANCHOR)
            w2 = base_of(old + second, given + second, fixed + second, j == 0, B, D, D, HAS_BASE, HAS_ANCHOR)
            z = tl.load(tile(own_work + b, C, B, H))
            d_z = tl.load(tile(own_work + PART + b, C, B, H))
            d_z -= tl.dot(d_d1, tl.trans(w2), input_precision=PRECISION) * slope_of(z, ACTIVATION)
            d_x0 += tl.dot(d_z, tl.trans(w1), input_precision=PRECISION)
            h1 = tl.dot(tl.trans(x0), d_z, input_precision=PRECISION)
            h2 = -tl.dot(tl.trans(activate(z, ACTIVATION)), d_d1, input_precision=PRECISION)
            if j == last_chunk:
                h1 += tl.load(tile(from_base + b, D, B, H))
                h2 += tl.load(tile(from_base + second, B, D, D))
            add_to_base(h1, grad + b, own_base + b, own_anchor + b, j == 0, D, B, H, HAS_BASE, HAS_ANCHOR)
            add_to_base(
                h2, grad + second, own_base + second, own_anchor + second, j == 0, B, D, D, HAS_BASE, HAS_ANCHOR
            )
        tl.store(tile(d_k + chunk * C * D, C, D, D), d_x0)
        tl.debug_barrier()
        old -= state_stride
