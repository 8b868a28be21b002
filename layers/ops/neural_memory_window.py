"""Steps of a neural memory on the losses of several tokens: the Omega rule of ATLAS (arXiv 2505.23735, eq. 9).

With a window of w tokens, and a share gamma of each token's loss:

    S_t = eta_t S_{t-1} - theta_t sum_{i = t - w + 1 .. t} gamma_i grad_i

All gradients of a chunk are taken at the same weights, those of the tokens before it too. So a window changes two
things: a chunk computes the gradients of w - 1 more tokens, and a token's gradient is in every step that sees it. Where
G_{t,s} is how much of step s the memory holds after token t, the gradient of token i is in it

    gamma_i sum_{s = i .. i + w - 1} G_{t,s}

times, and likewise in what a chunk leaves behind.
"""

import torch
from torch import Tensor

Recent = tuple[Tensor, Tensor, Tensor]
"""Keys (batch, w - 1, heads, d_0), values (batch, w - 1, heads, d_L) and shares (batch, w - 1, heads)."""


def check_window(window: int, gamma: Tensor | None, recent: Recent | None, k: Tensor, v: Tensor) -> None:
    """Check what a window brings, beside keys and values (batch, time, heads, d).

    Raises:
        ValueError: A shape does not fit.
    """
    if gamma is not None and gamma.shape != k.shape[:3]:
        raise ValueError(
            f"gamma has shape {tuple(gamma.shape)}; it must be (batch, time, heads) = {tuple(k.shape[:3])}"
        )
    if recent is None:
        return
    batch, _, heads, _ = k.shape
    fitting = [(batch, window - 1, heads, width) for width in (k.shape[-1], v.shape[-1])]
    shapes = [tuple(t.shape) for t in recent]
    if shapes != [*fitting, (batch, window - 1, heads)]:
        raise ValueError(
            f"recent has shapes {shapes}; with window={window} keys, values and shares must be "
            f"{[*fitting, (batch, window - 1, heads)]}: pass those of the {window - 1} tokens before, or None"
        )


def with_recent(k: Tensor, v: Tensor, gamma: Tensor | None, recent: Recent | None, window: int) -> Recent:
    """Return keys, values and shares of ``window - 1 + time`` tokens: those before, or zeros, and these.

    In the dtypes of these, to which the caller casts them: what lies before can be of a wider one.
    """
    these = (k, v, torch.ones_like(k[..., 0]) if gamma is None else gamma)
    before = recent or [t.new_zeros(t.shape[0], window - 1, *t.shape[2:]) for t in these]
    k, v, gamma = (torch.cat([old.to(new.dtype), new], 1) for old, new in zip(before, these, strict=True))
    return k, v, gamma


def latest(tokens: Recent, lengths: Tensor | None, window: int) -> Recent:
    """Return the last ``window - 1`` of what ``with_recent`` returned, of which ``lengths`` were no ``recent``."""
    count = window - 1
    if lengths is None:  # copies, since slices would keep all tokens alive
        k, v, gamma = (t[:, t.shape[1] - count :].clone(memory_format=torch.contiguous_format) for t in tokens)
    else:
        place = lengths[:, None] + torch.arange(count, device=lengths.device)
        row = torch.arange(len(place), device=place.device)[:, None]
        k, v, gamma = (t[row, place] for t in tokens)
    return k, v, gamma


def share_out(coefficients: tuple[Tensor, ...], gamma: Tensor) -> tuple[Tensor, ...]:
    """Turn coefficients of a chunk's C steps into those of the gradients of the C + w - 1 tokens they see.

    Args:
        coefficients: Of ``chunk_coefficients``.
        gamma: Shares, (n, R, C + w - 1).

    Returns:
        mix (n, R, C, C + w - 1), read as it was, write (n, k, R, C + w - 1, 1), transition as it was.
    """
    mix, read, write, transition = coefficients
    steps, tokens = mix.shape[-1], gamma.shape[-1]
    behind = torch.arange(tokens, device=mix.device) - torch.arange(steps, device=mix.device)[:, None]
    seen = ((behind >= 0) & (behind <= tokens - steps)).to(mix.dtype)  # (C, C + w - 1)
    mix = (mix @ seen) * gamma[:, :, None]
    write = (write.mT @ seen).mT * gamma[:, None, ..., None]
    return mix, read, write, transition
