"""Discrete key-value bottleneck: a frozen representation snaps to keys, and only the values behind them learn.

A representation is cut into low-dimensional heads, each head finds the nearest key of its own codebook, and the values
that belong to these keys are all that is passed on. Keys are set once, without labels, then frozen; training moves the
values that were fetched and no others, so what is learnt in one region of inputs leaves the others alone.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.bottleneck_checks import check_indices, is_fetched
from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.frozen_keys import FrozenKeys, Splitter
from memzoo.layers.ops.nearest_key import CHUNK_BYTES
from memzoo.layers.registry import register_layer
from memzoo.layers.sparse_gradients import SparseRows

ValueInit = Literal["zeros", "normal"]


@dataclass(frozen=True)
class BottleneckOutput:
    """What a lookup has found.

    Attributes:
        values: (batch, codebooks, tokens, dim_value), summed over the ``topk`` nearest.
        indices: (batch, codebooks, topk, tokens), int64, -1 where nothing is fetched.
        distances: (batch, codebooks, topk, tokens), squared; infinity where the index is -1.
    """

    values: Tensor
    indices: Tensor
    distances: Tensor


class DiscreteKeyValueBottleneck(FrozenKeys):
    """A representation, cut into heads, fetches from each codebook the value of the nearest key; values alone learn.

    ``h_c = z P_c``, ``j_c = argmin_j |h_c - k_cj|^2``, values ``V_c[j_c]`` for each codebook c and token.

    ``initialize_keys(batches)`` first, on representations without labels; then train ``trainable_parameters()``, the
    values. No gradient reaches keys, projection or ``z``. With ``vote`` the mean of the values is the logits: there is
    nothing else to train, and one step of SGD on a sample moves the logits of another by the share of pairs that the
    two have in common (``overlap``).

    **Optimisers.** A value that was not fetched stays what it is, to the bit, under SGD without momentum and weight
    decay, and with ``vote(..., sparse=True)`` under ``torch.optim.SparseAdam``, which touches rows with a gradient
    alone. Momentum, weight decay, Adam and AdamW move all values, of old classes too. ``clip_grad_norm_`` takes
    sparse gradients too, and clips them as it does dense ones.

    **Cost.** A sample costs ``2 codebooks dim_key (dim + num_pairs)`` multiplications and additions for its indices,
    which are constants once keys are frozen: keep them (``IndexCache``) and train with ``vote(indices)`` alone.

    **Precision.** Lookups are computed in at least float32, under autocast too, and projection and keys stay in it in a
    module of bfloat16. Where products of ``z`` are rounded otherwise (another batch size, another device), a head that
    lies between two keys to the last bits may find the other.

    Args:
        dim: Width of the representation.
        num_codebooks: Heads, each with keys of its own.
        num_pairs: Keys and values of a codebook.
        dim_key: Width of heads and keys.
        dim_value: Width of values; the number of classes for ``vote``.
        splitter: "random" projects each head on ``dim_key`` directions of length 1; "chunk" cuts ``z`` into heads, with
            ``dim = num_codebooks * dim_key``; "learned" draws ``projection`` as ``nn.Linear`` would, for one learnt
            elsewhere (principal components, say) to be copied or loaded into it. None is trained here.
        topk: How many of the nearest keys are fetched; fewer from a codebook that has fewer left.
        mask_unused: Fetch in ``eval()`` only pairs that were fetched in training; for values that do not start at zero.
        value_init: "zeros", or "normal" for N(0, 1).
        standardize: Shift and scale ``z`` by mean and standard deviation of what keys are initialised from.
        allow_random_keys: Let it be called before keys are initialised; they are N(0, 1) then.
        chunk_bytes: As in ``nearest_key``.

    Attributes:
        values: (num_codebooks, num_pairs, dim_value), the parameter.
        keys: (num_codebooks, num_pairs, dim_key).
        projection: (num_codebooks, dim, dim_key), not with "chunk".
        usage: (num_codebooks, num_pairs) int64, how often each pair was fetched in ``train()`` once keys were frozen,
            by ``forward``, ``read`` or ``vote``. Where ``torch.distributed`` is initialised it is summed over ranks, so
            that all agree: in ``train()`` every rank is to call these as often as the others.
        disabled: (num_codebooks, num_pairs) bool, pairs that are never fetched.

    Shape:
        z: (batch, dim) or (batch, tokens, dim). mask: (batch, tokens) bool, True at real tokens. Returns values (batch,
        num_codebooks, tokens, dim_value), zero at masked tokens; tokens is 1 without that axis.

    Raises:
        ValueError: A size is out of range, ``z`` or ``mask`` does not fit, or keys are not initialised.

    Reference:
        Träuble et al., arXiv 2207.11240; ftraeuble/discrete_key_value_bottleneck. Differences: keys are initialised
        with statistics that agree (``initialize_keys``); the mask of unused pairs is exact, and does nothing in a
        codebook of which nothing is used. Loops: ``memzoo.layers.reference.discrete_key_value_bottleneck``.

    Example:
        >>> import torch
        >>> bottleneck = DiscreteKeyValueBottleneck(32, num_codebooks=8, num_pairs=16, dim_key=4, dim_value=3)
        >>> z = torch.randn(200, 32)
        >>> bottleneck.initialize_keys([z])
        >>> indices = bottleneck.lookup(z)
        >>> indices.shape, bottleneck.vote(indices).shape
        (torch.Size([200, 8, 1, 1]), torch.Size([200, 3]))
    """

    def __init__(
        self,
        dim: int,
        *,
        num_codebooks: int = 256,
        num_pairs: int = 4096,
        dim_key: int = 14,
        dim_value: int = 10,
        splitter: Splitter = "random",
        topk: int = 1,
        mask_unused: bool = False,
        value_init: ValueInit = "zeros",
        standardize: bool = False,
        allow_random_keys: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        super().__init__(
            dim,
            num_codebooks=num_codebooks,
            num_pairs=num_pairs,
            dim_key=dim_key,
            splitter=splitter,
            topk=topk,
            mask_unused=mask_unused,
            standardize=standardize,
            allow_random_keys=allow_random_keys,
            chunk_bytes=chunk_bytes,
        )
        check_positive("dim_value", dim_value)
        check_choice("value_init", value_init, get_args(ValueInit))
        self.dim_value = dim_value
        self.values = nn.Parameter(torch.randn(num_codebooks, num_pairs, dim_value) * (value_init == "normal"))

    # Reading

    def read(self, indices: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the values of pairs (batch, num_codebooks, topk, tokens, dim_value).

        They are zero, and are not counted as usage, where the index is -1 or the mask is False.

        Args:
            indices: Of ``lookup``.
            mask: (batch, tokens) bool, real tokens; those that were masked in ``lookup`` need none.
        """
        check_indices(indices, self.num_codebooks, mask)
        self._count(indices, mask)
        return self._read(indices, mask)

    def vote(self, indices: Tensor, *, mask: Tensor | None = None, sparse: bool = False) -> Tensor:
        """Return the mean over codebooks and real tokens of the values, summed over ``topk``: logits without a decoder.

        Equal to ``read`` and a mean, without the fetched values in memory: they are added up, in order of codebooks, in
        one pass. A token is real if it has an index that is not -1 and the mask is True. Zero for a sample without one.

        Args:
            indices: Of ``lookup``; those of pairs that were disabled since are read all the same.
            mask: As in ``read``.
            sparse: Give ``values`` a sparse gradient, which costs what was fetched and not what there is.

        Shape:
            indices: (batch, num_codebooks, topk, tokens), integers. mask: (batch, tokens). Returns (batch, dim_value).
        """
        check_indices(indices, self.num_codebooks, mask)
        self._count(indices, mask)
        places, fetched = self._places(indices), is_fetched(indices, mask)
        if sparse:
            rows, first = places.flatten(1), None
            if not fetched.all():  # a gradient of zero would be one all the same
                rows, first = places[fetched], F.pad(fetched.flatten(1).sum(1).cumsum(0)[:-1], (1, 0))
            voted = F.embedding_bag(rows, SparseRows.apply(self.values), first, mode="sum", sparse=True)
        else:
            table = self.values.flatten(0, 1)
            weights = fetched.to(table.dtype).flatten(1)
            voted = F.embedding_bag(places.flatten(1), table, mode="sum", per_sample_weights=weights)
        return voted / (self.num_codebooks * _real_tokens(fetched)).clamp(min=1)[:, None]

    def forward(self, z: Tensor, *, mask: Tensor | None = None, return_info: bool = False) -> Tensor | BottleneckOutput:
        """Return what ``z`` fetches, or with ``return_info`` that and how it was found."""
        indices, distances = self._find(z, mask)
        self._count(indices, None)
        values = self._read(indices, None).sum(2)
        return BottleneckOutput(values, indices, distances) if return_info else values

    # Looking inside

    @torch.no_grad()
    def overlap(self, a: Tensor, b: Tensor, *, mask_a: Tensor | None = None, mask_b: Tensor | None = None) -> Tensor:
        """Return the share of pairs that every two samples have in common, (rows of a, rows of b), from 0 to 1.

        With one token and ``topk=1``, the share of codebooks in which both fetch the same. A step of plain SGD at rate
        r on ``a`` alone moves what is voted at ``b`` by ``-r overlap / num_codebooks`` times the gradient of the loss
        by the logits of ``a``; with more tokens or ``topk``, times ``topk ** 2``. Real tokens count, as in ``vote``:
        of the ``num_codebooks * topk ** 2`` times real tokens of the one times those of the other comparisons, how many
        find the same pair.

        Shape:
            a, b: (rows, num_codebooks, topk, tokens), as ``lookup`` returns them. mask_a, mask_b: (rows, tokens) bool.
        """
        check_indices(a, self.num_codebooks, mask_a)
        check_indices(b, self.num_codebooks, mask_b)
        found = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
        if not found.numel():
            return found
        own, other = is_fetched(a, mask_a), is_fetched(b, mask_b)
        # How often each row of b has each pair of a codebook, and the sum of that over the pairs of each row of a.
        rows = max(1, self.chunk_bytes // (4 * self.num_pairs))
        for c in range(self.num_codebooks):
            pairs, weights = a[:, c].flatten(1).long().clamp(min=0), own[:, c].flatten(1).float()
            for start in range(0, len(b), rows):
                part = slice(start, start + rows)
                theirs = b[part, c].flatten(1).long().clamp(min=0)
                table = weights.new_zeros(self.num_pairs, len(theirs))
                table.T.scatter_add_(1, theirs, other[part, c].flatten(1).float())
                found[:, part] += F.embedding_bag(pairs, table, mode="sum", per_sample_weights=weights)
        tokens = _real_tokens(own)[:, None] * _real_tokens(other)
        return found / (self.num_codebooks * a.shape[2] * b.shape[2] * tokens).clamp(min=1)

    # Changing what there is

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return what an optimiser is to be given: the values."""
        return [self.values]

    @torch.no_grad()
    def grow_classes(self, number: int) -> None:
        """Append columns of zeros to the values, for so many classes more; logits of the others stay, to the bit.

        ``values`` is another parameter then: give it to a new optimiser.
        """
        check_positive("number", number)
        new = self.values.new_zeros(self.num_codebooks, self.num_pairs, number)
        grown = nn.Parameter(torch.cat([self.values.detach(), new], -1), requires_grad=self.values.requires_grad)
        self.values, self.dim_value = grown, self.dim_value + number

    # Parts

    def _read(self, indices: Tensor, mask: Tensor | None) -> Tensor:
        values = F.embedding(self._places(indices), self.values.flatten(0, 1))
        return values.masked_fill_(~is_fetched(indices, mask)[..., None], 0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        """Take as many classes as the file has."""
        values = state_dict.get(f"{prefix}values")
        if values is not None and values.shape[:-1] == self.values.shape[:-1] and len(values.shape) == 3:
            number = values.shape[-1] - self.dim_value
            if number > 0:
                self.grow_classes(number)
        super()._load_from_state_dict(state_dict, prefix, *more)

    def extra_repr(self) -> str:
        """Name the sizes."""
        return (
            f"dim={self.dim}, num_codebooks={self.num_codebooks}, num_pairs={self.num_pairs}, dim_key={self.dim_key}, "
            f"dim_value={self.dim_value}, splitter={self.splitter!r}"
        )


def _real_tokens(fetched: Tensor) -> Tensor:
    """Count the tokens of each row that fetch anything, of (rows, codebooks, topk, tokens)."""
    return fetched.flatten(1, 2).any(1).sum(1)


@register_layer("discrete_key_value_bottleneck", "bottleneck")
def _discrete_key_value_bottleneck(dim: int, **overrides: Any) -> DiscreteKeyValueBottleneck:
    sizes: dict[str, Any] = {"num_codebooks": 6, "num_pairs": 9, "dim_key": 3, "dim_value": 5}
    return DiscreteKeyValueBottleneck(dim, **sizes | {"allow_random_keys": True, "value_init": "normal"} | overrides)
