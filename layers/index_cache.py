"""IndexCache: the pairs that every sample of a data set fetches, once computed.

Encoder, projection and keys of a discrete key-value bottleneck are frozen, so its indices are constants of a sample:
they are kept in one, two or four bytes each, and training is left with reading values.
"""

import os
from typing import Self

import torch
from torch import Tensor

from memzoo.layers.errors import check_positive


class IndexCache:
    """Indices by sample, with the fingerprint of what computed them.

    They are wrong as soon as the encoder, the projection, the keys or a transform of the inputs changes, or an input is
    augmented: that is what the fingerprint is for, which must be of all that they depend on. With ``mask_unused`` they
    also depend on what was trained: do not keep those then.

    Args:
        indices: Of every sample, in its order; -1 where nothing is fetched, as ``lookup`` returns it.
        num_pairs: Of a codebook; says how many bytes an index takes.
        fingerprint: Of what computed them.

    Shape:
        indices: (samples, ...), integers.

    Raises:
        ValueError: The indices are no integers in ``[-1, num_pairs)``.

    Example:
        >>> import torch
        >>> cache = IndexCache(torch.tensor([[3, 0], [1, 2]]), num_pairs=4, fingerprint="of the encoder and keys")
        >>> cache[torch.tensor([1])], cache.nbytes
        (tensor([[1, 2]]), 4)
    """

    def __init__(self, indices: Tensor, num_pairs: int, fingerprint: str) -> None:
        check_positive("num_pairs", num_pairs)
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool or indices.dim() < 1:
            raise ValueError(
                f"indices has shape {tuple(indices.shape)} and dtype {indices.dtype}; it must hold integers, a row for "
                f"each sample"
            )
        if indices.numel() and not -1 <= int(indices.min()) <= int(indices.max()) < num_pairs:
            raise ValueError(
                f"indices holds {int(indices.min())} to {int(indices.max())}, outside [-1, {num_pairs}); use those of "
                f"a bottleneck with num_pairs={num_pairs}"
            )
        none = bool((indices < 0).any())
        self.indices = indices.to(compact_dtype(num_pairs, signed=none))
        self.num_pairs = num_pairs
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, samples: int | slice | Tensor) -> Tensor:
        """Return the indices of some samples, as int64."""
        return self.indices[samples].long()

    @property
    def nbytes(self) -> int:
        """Count the bytes of all indices."""
        return self.indices.nbytes

    def check(self, fingerprint: str) -> None:
        """Require the fingerprint of what the indices are to be used with.

        Raises:
            ValueError: It is another.
        """
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"fingerprint={fingerprint!r} is not that of the cached indices, {self.fingerprint!r}: the encoder, "
                f"the projection or the keys have changed; compute the indices again"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        part = f"{os.fspath(path)}.part"
        about = {"num_pairs": str(self.num_pairs), "fingerprint": self.fingerprint}
        save_file({"indices": self.indices.contiguous()}, part, metadata=about)
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], fingerprint: str) -> Self:
        """Read a file of ``save``.

        Args:
            path: Of the file.
            fingerprint: Of what the indices are to be used with.

        Raises:
            ValueError: There is no such file, or it was computed with something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                cache = cls(file.get_tensor("indices"), int(about["num_pairs"]), about["fingerprint"])
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"path={os.fspath(path)!r} is no file of cached indices ({error}); write one") from error
        cache.check(fingerprint)
        return cache


def compact_dtype(num_pairs: int, *, signed: bool = False) -> torch.dtype:
    """Return the smallest dtype for indices below ``num_pairs``: uint8, int16, int32 or int64; signed, with int8."""
    for dtype in (torch.int8 if signed else torch.uint8, torch.int16, torch.int32):
        if num_pairs - 1 <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64
