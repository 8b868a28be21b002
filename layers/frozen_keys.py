"""Frozen keys: heads of a representation, and the nearest keys of each; set once without labels, then constant."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from memzoo.layers.bottleneck_checks import check_representation, check_sizes, is_fetched, masked_to_zero
from memzoo.layers.errors import check_choice
from memzoo.layers.key_initialization import (
    KeyMethod,
    check_key_options,
    find_keys,
    mean_and_scale,
    spread,
    sum_over_ranks,
)
from memzoo.layers.ops.nearest_key import nearest_key
from memzoo.layers.ops.precision import no_autocast

Splitter = Literal["random", "chunk", "learned"]
FRESH, INITIALISING, FROZEN = 0, 1, 2
EXACT_BUFFERS = ("projection", "keys", "shift", "scale")  # stay in at least float32 in a module of less


class FrozenKeys(nn.Module):
    """The half of a discrete key-value bottleneck that does not learn; see there for arguments and attributes."""

    keys: Tensor
    usage: Tensor
    disabled: Tensor
    projection: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    _stage: Tensor

    def __init__(
        self,
        dim: int,
        *,
        num_codebooks: int,
        num_pairs: int,
        dim_key: int,
        splitter: Splitter,
        topk: int,
        mask_unused: bool,
        standardize: bool,
        allow_random_keys: bool,
        chunk_bytes: int,
    ) -> None:
        super().__init__()
        check_sizes(dim, num_codebooks, num_pairs, dim_key, topk, chunk_bytes)
        check_choice("splitter", splitter, get_args(Splitter))
        if splitter == "chunk" and dim != num_codebooks * dim_key:
            raise ValueError(
                f"dim={dim} is not num_codebooks={num_codebooks} times dim_key={dim_key}, which splitter='chunk' cuts "
                f"it into; use dim={num_codebooks * dim_key}, or splitter='random'"
            )
        self.dim, self.num_codebooks, self.num_pairs, self.dim_key = dim, num_codebooks, num_pairs, dim_key
        self.splitter, self.topk, self.mask_unused, self.standardize = splitter, topk, mask_unused, standardize
        self.allow_random_keys, self.chunk_bytes = allow_random_keys, chunk_bytes
        table = (num_codebooks, num_pairs)
        self.register_buffer("projection", None if splitter == "chunk" else self._draw_projection())
        self.register_buffer("keys", torch.randn(*table, dim_key))
        self.register_buffer("usage", torch.zeros(table, dtype=torch.int64))
        self.register_buffer("disabled", torch.zeros(table, dtype=torch.bool))
        self.register_buffer("shift", torch.zeros(dim) if standardize else None)
        self.register_buffer("scale", torch.ones(dim) if standardize else None)
        self.register_buffer("_stage", torch.tensor(FRESH))

    # Keys

    @property
    def stage(self) -> int:
        """0 with fresh keys, 1 while they are initialised, 2 once they are frozen."""
        return int(self._stage)

    @torch.no_grad()
    def initialize_keys(
        self,
        batches: Iterable[Tensor],
        *,
        method: KeyMethod = "ema",
        epochs: int = 10,
        decay: float = 0.95,
        seed: int = 0,
        force: bool = False,
    ) -> None:
        """Set the keys to represent some representations, without labels, and freeze them; usage starts at zero.

        What is drawn depends on ``seed`` alone. If anything fails, the bottleneck is what it was.

        Args:
            batches: Of ``z``; gone through once an epoch, and once more for a start, so an iterable that can be gone
                through again, such as a list. Labels are no part of it.
            method: As in ``find_keys``: "ema", "ema_official", "sample", "kmeans" or "random".
            epochs: Passes; iterations of "kmeans".
            decay: Of the running means.
            seed: Of what is drawn.
            force: Do it although keys are frozen: what values were trained for is lost.

        Raises:
            ValueError: Keys are frozen and ``force`` is not set, or ``batches`` or an option does not fit.
        """
        if self.stage == FROZEN and not force:
            raise ValueError(
                "force=False, and the keys are frozen already: values were trained for these; use force=True to start "
                "anew"
            )
        check_key_options(method, epochs, decay)
        if isinstance(batches, Iterator):
            raise ValueError(
                f"batches={type(batches).__name__} can be gone through once; give a list, or an object whose __iter__ "
                f"begins again"
            )
        before = {name: buffer.clone() for name, buffer in self.named_buffers(recurse=False)}
        self._stage.fill_(INITIALISING)
        try:
            if self.shift is not None and self.scale is not None:
                mean, scale = mean_and_scale((self._rows(batch) for batch in batches), self.dim)
                self.shift.copy_(mean)
                self.scale.copy_(scale)
            keys = find_keys(
                lambda: (self._heads(self._rows(batch)) for batch in batches),
                self.keys,
                method=method,
                epochs=epochs,
                decay=decay,
                seed=seed,
                chunk_bytes=self.chunk_bytes,
            )
            self.keys.copy_(keys)
        except BaseException:
            for name, buffer in before.items():
                self.get_buffer(name).copy_(buffer)
            raise
        self.usage.zero_()
        self._stage.fill_(FROZEN)

    def freeze_keys(self) -> None:
        """Take the keys as they are: drawn at random, or copied into ``keys``. Usage starts at zero.

        Raises:
            ValueError: ``standardize`` is set, and ``shift`` and ``scale`` are no statistics yet.
        """
        if self.stage != FROZEN:
            if self.shift is not None and self.scale is not None and not self.shift.any() and (self.scale == 1).all():
                raise ValueError(
                    "standardize=True, and shift and scale are those it was built with, which standardise nothing; "
                    "call initialize_keys(batches), which finds them, or copy a mean and a deviation into them first"
                )
            self.usage.zero_()
            self._stage.fill_(FROZEN)

    # Looking

    def lookup(self, z: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the pairs that ``z`` fetches (batch, num_codebooks, topk, tokens), int64.

        It is -1 where nothing is: at masked tokens, and after the pairs of a codebook that has fewer left than ``topk``
        (``disable_pairs``, ``mask_unused``). ``read``, ``vote`` and ``overlap`` pass over these.

        Once keys are frozen it is a constant of ``z``, unless ``mask_unused`` is set.
        """
        return self._find(z, mask)[0]

    @property
    def fraction_unused(self) -> float:
        """Share of all pairs that no training sample has fetched."""
        return float((self.usage == 0).double().mean())

    def fingerprint(self) -> str:
        """Return SHA-256 of all that a lookup depends on: projection, standardisation, keys and which are disabled."""
        digest = hashlib.sha256(repr((self.splitter, self.topk, self.dim, *self.keys.shape)).encode())
        for name in (*EXACT_BUFFERS, "disabled"):
            buffer = self._buffers[name]
            if buffer is not None and (name != "disabled" or buffer.any()):
                digest.update(f"{name} {buffer.dtype}".encode())
                digest.update(buffer.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def disable_pairs(self, mask: Tensor) -> None:
        """Never fetch some pairs again, besides those that were disabled before: zero-shot unlearning.

        Lookups that they would have answered get the nearest of the others. Values stay; ``disabled.zero_()`` takes it
        back. Cached indices have another ``fingerprint``.

        Args:
            mask: (num_codebooks, num_pairs) bool.

        Raises:
            ValueError: It does not fit, or a codebook would be left without a pair.

        Reference:
            Unlearning via sparse representations, arXiv 2311.15268.
        """
        if mask.shape != self.disabled.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; it must be bool, "
                f"{tuple(self.disabled.shape)}: which pairs to disable"
            )
        disabled = self.disabled | mask.to(self.disabled.device)
        if disabled.all(1).any():
            codebook = int(disabled.all(1).nonzero()[0])
            raise ValueError(f"mask leaves codebook {codebook} without a pair; leave one of each")
        self.disabled.copy_(disabled)

    # Parts

    def _draw_projection(self) -> Tensor:
        drawn = torch.randn(self.num_codebooks, self.dim, self.dim_key)
        if self.splitter == "learned":
            return drawn.uniform_(-1, 1).mul_(self.dim**-0.5)
        length: Tensor = torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
        return drawn / length

    def _find(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling() and not self._stage.is_meta:
            self._check_stage()
        z, mask = check_representation(z, mask, self.dim)
        heads = self._heads(masked_to_zero(z, mask))
        allowed = ~self.disabled
        if self.mask_unused and not self.training:
            used = allowed & (self.usage > 0)
            allowed = torch.where(used.any(1, keepdim=True), used, allowed)
        found = nearest_key(heads, self.keys, topk=self.topk, allowed=allowed, chunk_bytes=self.chunk_bytes)
        indices, distances = (tensor.permute(0, 2, 3, 1) for tensor in found)  # from (batch, tokens, codebooks, topk)
        if mask is not None:
            padding = ~mask[:, None, None]
            indices, distances = indices.masked_fill(padding, -1), distances.masked_fill(padding, torch.inf)
        return indices, distances

    @torch.no_grad()
    def _heads(self, z: Tensor) -> Tensor:
        """Return (..., codebooks, dim_key) of (..., dim), in the dtype of the keys or a wider one."""
        z = z.to(torch.promote_types(z.dtype, self.keys.dtype))
        with no_autocast(z.device):
            if self.shift is not None and self.scale is not None:
                z = (z - self.shift) / self.scale
            if self.projection is None:
                return z.reshape(*z.shape[:-1], self.num_codebooks, self.dim_key)
            heads: Tensor = torch.einsum("...d,cdk->...ck", z, self.projection.to(z.dtype))
            return heads

    def _rows(self, batch: Tensor) -> Tensor:
        """Return the vectors of a batch, (rows, dim)."""
        if not isinstance(batch, Tensor):
            raise ValueError(
                f"batches holds a {type(batch).__name__}; it must hold tensors of representations, without labels"
            )
        return check_representation(batch, None, self.dim, "batches")[0].to(self.keys.device).flatten(0, 1)

    def _places(self, indices: Tensor) -> Tensor:
        """Return the rows of pairs in the table of all codebooks; of -1 that of the first pair."""
        first = torch.arange(self.num_codebooks, device=indices.device) * self.num_pairs
        return indices.long().clamp(min=0) + first[:, None, None]

    @torch.no_grad()
    def _count(self, indices: Tensor, mask: Tensor | None) -> None:
        """Count what training fetches, on all ranks."""
        if not self.training:
            return
        counted = (is_fetched(indices, mask) * (self._stage == FROZEN)).flatten().to(self.usage.dtype)
        places = self._places(indices).flatten()
        if spread():
            more = torch.zeros_like(self.usage)
            more.view(-1).scatter_add_(0, places, counted)
            sum_over_ranks(more)
            self.usage.add_(more)
        else:
            self.usage.view(-1).scatter_add_(0, places, counted)

    def _check_stage(self) -> None:
        if self.stage != FROZEN and not self.allow_random_keys:
            raise ValueError(
                f"stage={self.stage}: the keys are not initialised; call initialize_keys(batches) first, or build it "
                f"with allow_random_keys=True"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep what lookups are computed from in at least float32, whatever the module is cast to."""
        before = {name: self._buffers[name] for name in EXACT_BUFFERS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = buffer.to(now.device)
        return self
