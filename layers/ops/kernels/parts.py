"""What both kernels of a neural memory's scan use: places of tiles, weights, the error, activations, derivatives."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def tile(start, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """Places of a part of a matrix whose rows lie ``STRIDE`` apart."""
    return start + tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def base_of(
    own, base, anchor, is_first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_ANCHOR: tl.constexpr,
):  # fmt: skip
    """W, a tile of the weights at which a chunk's gradients are taken: in the first chunk those given, if any."""
    w = tl.load(tile(own, ROWS, COLUMNS, STRIDE))
    if HAS_ANCHOR:
        w += tl.load(tile(anchor, ROWS, COLUMNS, STRIDE))
    return at_first(w, base, is_first, ROWS, COLUMNS, STRIDE, HAS_BASE)


@triton.jit
def at_first(
    w, base, is_first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr, HAS_BASE: tl.constexpr
):
    """``w``, or the tile at ``base`` in the first chunk of what has a base of its own."""
    if HAS_BASE:  # noqa: SIM102 - known when compiling, which the other is not
        if is_first:
            w = tl.load(tile(base, ROWS, COLUMNS, STRIDE))
    return w


@triton.jit
def add_to_base(
    h, own, base, anchor, is_first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_ANCHOR: tl.constexpr,
):  # fmt: skip
    """Add ``h``, a gradient of ``base_of``, to those of what it took."""
    if HAS_BASE:
        if is_first:
            to = tile(base, ROWS, COLUMNS, STRIDE)
            tl.store(to, tl.load(to) + h)
        else:
            _add_to_sum(h, own, anchor, ROWS, COLUMNS, STRIDE, HAS_ANCHOR)
    else:
        _add_to_sum(h, own, anchor, ROWS, COLUMNS, STRIDE, HAS_ANCHOR)


@triton.jit
def _add_to_sum(
    h, own, anchor, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr, HAS_ANCHOR: tl.constexpr
):
    to = tile(own, ROWS, COLUMNS, STRIDE)
    tl.store(to, tl.load(to) + h)
    if HAS_ANCHOR:
        to = tile(anchor, ROWS, COLUMNS, STRIDE)
        tl.store(to, tl.load(to) + h)


@triton.jit
def error_at_base(
    k, v, old, given, fixed, is_first, C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, B: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_ANCHOR: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``v - M(W; k)`` of a chunk."""
    error = tl.load(tile(v, C, D, D))
    for b in range(0, H, B):
        second = D * H + b * D  # of the part, which begins at b in the first layer
        x0 = tl.load(tile(k, C, D, D))
        w1 = base_of(old + b, given + b, fixed + b, is_first, D, B, H, HAS_BASE, HAS_ANCHOR)
        w2 = base_of(old + second, given + second, fixed + second, is_first, B, D, D, HAS_BASE, HAS_ANCHOR)
        x1 = activate(tl.dot(x0, w1, input_precision=PRECISION), ACTIVATION)
        error -= tl.dot(x1, w2, input_precision=PRECISION)
    return error


@triton.jit
def squared_norms(
    keys, d1, old, given, fixed, is_first, D: tl.constexpr, H: tl.constexpr, B: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_ANCHOR: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of every token's first error and second input, each (C,)."""
    of_error = tl.zeros_like(tl.sum(d1, 1))
    of_input = tl.zeros_like(of_error)
    for b in range(0, H, B):
        second = D * H + b * D
        w1 = base_of(old + b, given + b, fixed + b, is_first, D, B, H, HAS_BASE, HAS_ANCHOR)
        w2 = base_of(old + second, given + second, fixed + second, is_first, B, D, D, HAS_BASE, HAS_ANCHOR)
        z = tl.dot(tl.load(keys), w1, input_precision=PRECISION)
        x1 = activate(z, ACTIVATION)
        d0 = tl.dot(d1, tl.trans(w2), input_precision=PRECISION) * slope_of(z, ACTIVATION)
        of_error += tl.sum(d0 * d0, 1)
        of_input += tl.sum(x1 * x1, 1)
    return of_error, of_input


@triton.jit
def limit_factor(squared, limit):
    """Of ``memzoo.layers.ops.neural_memory_clip.clip_factor``: 0 where ``squared`` is not finite."""
    most = limit * limit
    factor = tl.where(squared > most, limit / tl.sqrt(tl.maximum(squared, most)), 1.0)
    return tl.where(squared < float("inf"), factor, 0.0)


@triton.jit
def _density(z):
    """Of the standard normal."""
    return tl.exp(z * z * -0.5) * 0.3989422804014327


@triton.jit
def _distribution(z):
    """Of the standard normal."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """A function of ``memzoo.layers.ops.activations``, by its name."""
    if ACTIVATION == "silu":
        value = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        value = z * _distribution(z)
    elif ACTIVATION == "relu":
        value = tl.where(z > 0, z, 0.0)
    else:
        value = z
    return value


@triton.jit
def slope_of(z, ACTIVATION: tl.constexpr):
    """Its first derivative."""
    if ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        slope = s + z * s * (1.0 - s)
    elif ACTIVATION == "gelu":
        slope = _distribution(z) + z * _density(z)
    elif ACTIVATION == "relu":
        slope = tl.where(z > 0, 1.0, 0.0).to(z.dtype)
    else:
        slope = tl.zeros_like(z) + 1.0
    return slope


@triton.jit
def bend_of(z, ACTIVATION: tl.constexpr):
    """Its second derivative."""
    if ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        bend = s * (1.0 - s) * (2.0 + z * (1.0 - 2.0 * s))
    elif ACTIVATION == "gelu":
        bend = (2.0 - tl.minimum(z * z, 4096.0)) * _density(z)  # an infinite square times zero is no number
    else:
        bend = tl.zeros_like(z)
    return bend
