"""Locas: locally-supported parametric memory, slots beside the feed-forwards of a host that begin as its own.

A narrow feed-forward runs beside each of the host's, reads the same input and is added: ``H = FFN(A) + tau * S(A)``.
Its slots begin as clones of those that the host uses most on the present text, and return nothing at first; then
backpropagation trains them while the host reads on. Having the shape of a feed-forward, they can be taken away, kept,
or made part of the host's.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Self, cast, get_args

import torch
from torch import Tensor, nn

from memzoo.layers.errors import check_choice, check_number, check_positive
from memzoo.layers.feed_forward_site import FeedForwardSite
from memzoo.layers.locas_fill import Filling
from memzoo.layers.locas_init import Init, LogLikelihood, check_clones, fingerprint, slot_scale
from memzoo.layers.locas_merge import AppendedSlots, append_slots
from memzoo.layers.registry import register_layer
from memzoo.layers.side_memory import Run, SideMemory, check_seed
from memzoo.layers.side_slots import Clip, SideSlots
from memzoo.layers.sites import find_feed_forwards

_ROWS: ContextVar[Mapping["Locas", Tensor]] = ContextVar("memzoo.locas_rows", default=MappingProxyType({}))
"""Whose memory each row reads, in this thread or task; only ``Locas.rows`` sets it."""


class Locas(SideMemory):
    """Slots beside the feed-forwards of a host, gated as the host's are (Locas-GLU) or not (Locas-MLP).

    ``memory = Locas.attach(model)``, ``memory.memorize(tokens)``, then train ``memory.parameters()`` on what the model
    reads. The host is frozen meanwhile. Attached, it takes ``3 * rank * dim`` parameters a gated feed-forward and
    ``2 * rank * dim`` another, and ``rank`` more for every bias of the host's slots. Until it has learnt something, the
    host's outputs are what they were, to the bit, but with ``init="gradient"``.

    What is read of a slot's vectors is at most one long, which bounds how far a memory moves the host; not its biases,
    and with ``clip="project"`` only from one ``constrain()`` to the next step of the optimiser.

    Attributes:
        slots: The slots of each site, in the order of ``sites``.

    Shape:
        A host's feed-forward reads (batch, ..., dim), or (tokens, dim) where all rows share a memory.

    Reference:
        Lu et al., arXiv 2602.05085. Slots are rows here. The optimiser, its steps and the chunks of text are the
        caller's: see ``TestTimeTrainingModule``.

    Example:
        >>> import torch
        >>> from memzoo.arch import create_model
        >>> from memzoo.layers import Locas
        >>> model = create_model("transformer_tiny")
        >>> tokens = torch.randint(256, (1, 64))
        >>> before, _ = model(tokens)
        >>> memory = Locas.attach(model, rank=8)
        >>> memory.memorize(tokens)
        >>> torch.equal(model(tokens)[0], before)  # nothing is learnt yet
        True
        >>> optimizer = torch.optim.AdamW(memory.parameters(), lr=4e-3, weight_decay=0)
    """

    def __init__(
        self,
        host: nn.Module,
        feed_forwards: Mapping[str, FeedForwardSite],
        *,
        rank: int,
        init: Init,
        batch_size: int | None,
        clip: Clip,
        tau: float | None,
        seed: int,
        wrap: bool,
    ) -> None:
        super().__init__(host, {name: site.module for name, site in feed_forwards.items()}, wrap=wrap)
        self.init, self.batch_size, self.seed = init, batch_size, seed
        self._feed_forwards = dict(feed_forwards)
        self._sizes = [[site.dim, site.width] for site in feed_forwards.values()]
        self._appended: AppendedSlots | None = None  # while merged
        self.slots = nn.ModuleList(
            SideSlots(
                rank,
                site.dim,
                slot_scale(site, rank) if tau is None else torch.tensor(tau, dtype=torch.float64, device="cpu"),
                activation=site.activation,
                gated=site.gated,
                biases=tuple(n for n, b in (("key", site.up_bias), ("gate", site.gate_bias)) if b is not None),
                batch_size=batch_size,
                clip=clip,
                like=site.up_weight,
            )
            for site in feed_forwards.values()
        )

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        *,
        rank: int = 64,
        sites: Sequence[str] | None = None,
        init: Init = "topk",
        batch_size: int | None = None,
        clip: Clip = "forward",
        tau: float | None = None,
        seed: int = 0,
        wrap: bool = False,
    ) -> Self:
        """Attach empty slots to a model.

        Args:
            model: The host: a model of ours, one of transformers, a ViT of timm, or any with feed-forwards that
                ``find_feed_forwards`` knows.
            rank: Slots beside each feed-forward.
            sites: Names of the feed-forwards; by default all, one a layer. Of a mixture of experts name the shared one.
            init: How ``memorize`` fills slots. Clones of the host's slots, scaled to length one, that return nothing:
                "topk" those with the largest mean ``|M|`` over the text, ``M`` being what the host multiplies its slots
                with; "bottomk" the smallest; "topk_contribution" the largest mean ``|M|`` times the length of what the
                slot returns; "random_clone" any. Or "gaussian", directions drawn by chance, and "activation", what the
                feed-forward read at evenly spread tokens, both of length one and returning nothing. Or "gradient", for
                hosts without a gate: those same keys, which return the direction in which the text gets likelier.
            batch_size: Rows of the batch that each have a memory of their own; None for one that all rows share.
            clip: Where slots are kept from growing longer than one: "forward" in every call, "project" in the
                parameters, by ``constrain()`` after each step of the optimiser.
            tau: Factor of what is read. By default ``1 / rank`` of the mean length of what the host's slots return.
            seed: Of what is drawn by chance.
            wrap: As in ``SideMemory``.

        Raises:
            ValueError: An argument is out of range, or the model has no feed-forwards that slots can be beside.
        """
        check_positive("rank", rank)
        check_choice("init", init, get_args(Init))
        check_choice("clip", clip, get_args(Clip))
        if batch_size is not None:
            check_positive("batch_size", batch_size)
        if tau is not None:
            check_number("tau", tau)
        check_seed(seed)
        found = find_feed_forwards(model, sites)
        for name, site in found.items():
            check_clones(init, rank, site)
            if init == "gradient" and site.gated:
                raise ValueError(
                    f"init='gradient' is for feed-forwards without a gate, and {name!r} has one; use 'topk'"
                )
        options = dict(rank=rank, init=init, batch_size=batch_size, clip=clip, tau=tau, seed=seed, wrap=wrap)
        return cls(model, found, **options)._install()  # type: ignore[arg-type]

    def beside(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """Return ``y + tau * S(x)``."""
        rows = None if self.batch_size is None else _ROWS.get().get(self)
        return cast(Tensor, self.slots[index](x, y, rows))

    @contextmanager
    def rows(self, index: Tensor) -> Iterator[Self]:
        """Let each row of the batch read the memory that is named, in the calls of this thread inside.

        ``with memory.rows(torch.arange(n).repeat_interleave(copies))`` is for what repeats rows, as ``generate`` of
        transformers does for beams. Outside of it the batch has ``batch_size`` rows, each with its own.

        Args:
            index: Which of the memories each row reads, (batch,) int64.

        Raises:
            ValueError: All rows share one memory, or ``index`` is not (batch,) int64 in range.
        """
        if self.batch_size is None:
            raise ValueError("rows() of one memory that all rows share, batch_size=None; call the host without it")
        if index.dim() != 1 or index.dtype != torch.int64 or not bool(((index >= 0) & (index < self.batch_size)).all()):
            raise ValueError(
                f"index={index.tolist()} of {index.dtype} does not name memories; pass (batch,) int64 from 0, below "
                f"batch_size={self.batch_size}"
            )
        token = _ROWS.set({**_ROWS.get(), self: index.clone()})
        try:
            yield self
        finally:
            _ROWS.reset(token)

    @property
    def free(self) -> int:
        """How many slots of each site are empty."""
        return min(slots.slots - slots.filled for slots in self._slots())

    # Filling

    def memorize(
        self,
        inputs: Tensor,
        *,
        mask: Tensor | None = None,
        run: Run | None = None,
        log_likelihood: LogLikelihood | None = None,
    ) -> None:
        """Fill the empty slots as ``init`` says, from one call of the host, whose outputs stay what they are.

        Args:
            inputs: What the host reads: tokens, images.
            mask: Which of what the feed-forwards read counts; all by default. Padding must not.
            run: Calls the host, ``run(inputs)``; by default ``host(inputs)``. Needed for further arguments, such as an
                attention mask. It may call it in pieces if there is no mask, but for "gradient"; other threads' calls
                do not count.
            log_likelihood: For "gradient", as in ``write``.

        Shape:
            inputs: (batch, ...). mask: (batch, tokens), bool or integers.

        Raises:
            ValueError: No slot is empty, the batch is empty or not of ``batch_size`` rows, ``mask`` does not fit or a
                row of it counts nothing, the host does not call a site, or there are too few tokens.
        """
        self._check_use("memorize")
        filling = self._filling(inputs, mask, run)
        count = self._check_free(1, "reset() empties them, expand() adds some")
        if self.init == "gradient":
            filling.write(count, log_likelihood)
        elif self.init == "gaussian":
            filling.draw(count, self.seed)
        elif self.init == "activation":
            filling.read(count)
        else:
            filling.clone(count, self.init, self.seed)

    def write(
        self,
        inputs: Tensor,
        *,
        mask: Tensor | None = None,
        run: Run | None = None,
        log_likelihood: LogLikelihood | None = None,
        eps: float = 1.0,
        per_token: bool = False,
    ) -> None:
        """Give every token that counts the next empty slot of every site (Locas-MLP; one backward pass, no optimiser).

        Its key is the direction of what the feed-forward reads at the token, its value ``eps`` times the direction in
        which the token's log-likelihood rises with what the feed-forward returns; lengths of the latter are relative
        over all sites. A small step in that direction makes the text likelier.

        Args:
            inputs: As in ``memorize``, and so ``mask`` and ``run``.
            mask: Which tokens are text: they are written, and no other's likelihood counts, but with a
                ``log_likelihood`` of yours.
            run: Calls the host.
            log_likelihood: ``log_likelihood(output, inputs)`` of every token (batch, tokens), from what the host
                returns; by default that of the next token, of a language model.
            eps: Length of a token's values over all sites.
            per_token: Take each token's own log-likelihood, as the paper has it, at a backward pass for each. By
                default the sum of all, in which what a token does for later ones has a part.

        Raises:
            ValueError: A feed-forward has a gate, there are fewer empty slots than tokens, or as ``memorize``.
        """
        self._check_use("write")
        check_number("eps", eps)
        if any(slots.gate is not None for slots in self._slots()):
            raise ValueError("write() is for feed-forwards without a gate, and the host's have one; use memorize()")
        self._filling(inputs, mask, run).write(
            lambda number: min(number, self._check_free(number, "expand() adds some, compress() makes room")),
            log_likelihood,
            eps=eps,
            per_token=per_token,
        )

    def compress(self, count: int, *, both_signs: bool = False) -> None:
        """Replace the slots by ``count`` others that span the directions of their keys, and empty the rest (NL-SVD).

        What the memory says along each new key is exact where ``clip`` does not bound it, elsewhere an approximation:
        see ``nonlinear_svd``.

        Args:
            count: New slots of each site, at most ``dim``; twice as many with ``both_signs``.
            both_signs: Let the other direction of each have a slot too.

        Raises:
            ValueError: The host's feed-forwards have a gate, a key bias that is not zero or another activation than
                ReLU, or ``count`` is out of range.
        """
        self._check_use("compress")
        check_positive("count", count)
        needed = count * (2 if both_signs else 1)
        for name, slots in zip(self.sites, self._slots(), strict=True):
            if not slots.is_relu:
                raise ValueError(
                    f"compress() is for slots relu(x K^T) V, and those of {name!r} have a gate, a bias or another "
                    f"activation; use a lower rank instead"
                )
            if needed > slots.slots:
                raise ValueError(f"count={count} needs {needed} slots, and there are {slots.slots}; lower count")
        for slots in self._slots():
            slots.compress(count, both_signs=both_signs)

    def expand(self, extra: int) -> None:
        """Add empty slots to every site, for ``memorize`` or ``write`` to fill.

        What is read changes by rounding at most; ``tau`` stays what it is. The parameters are new objects: make a new
        optimiser.
        """
        self._check_use("expand")
        check_positive("extra", extra)
        for slots, site in zip(self._slots(), self._feed_forwards.values(), strict=True):
            check_clones(self.init, slots.slots + extra, site)
        for slots in self._slots():
            slots.expand(extra)

    def reset(self) -> None:
        """Empty all slots; how many there are and ``tau`` stay, which are those of attaching but for ``expand``."""
        self._check_use("reset")
        for slots in self._slots():
            slots.clear()

    def constrain(self) -> None:
        """With ``clip="project"``, scale slots that have grown longer than one down to it."""
        for slots in self._slots():
            if slots.clip == "project":
                slots.project()

    # In the host's weights

    def merge(self, *, row: int | None = None, multiple_of: int = 1) -> None:
        """Append the slots to the host's feed-forwards, which then need nothing beside them.

        Equal to the slots beside them up to rounding. Others as wide as these get as many slots of zeros, as a host's
        configuration knows one width, which is set too. Optimisers of the host's parameters must be made anew.

        Args:
            row: Whose memory, where each row of the batch has its own.
            multiple_of: Append slots of zeros until the width is a multiple of this, as fast kernels want it.

        Raises:
            ValueError: ``row`` is missing, unwanted or out of range; or as ``append_slots`` and ``SideMemory.merge``.
        """
        check_positive("multiple_of", multiple_of)
        if (row is None) != (self.batch_size is None):
            wanted = "one of the batch" if row is None else "None, as all rows share one memory"
            raise ValueError(f"row={row} of batch_size={self.batch_size}; pass {wanted}")
        if row is not None and not 0 <= row < (self.batch_size or 0):
            raise ValueError(f"row={row} is outside of batch_size={self.batch_size}; use one from 0")
        self._merging = (row, multiple_of)
        super().merge()

    def _append(self) -> None:
        row, multiple_of = self._merging
        beside = list(zip(self._feed_forwards.values(), self._slots(), strict=True))
        self._appended = append_slots(self.host, beside, row=row, multiple_of=multiple_of)

    def _remove(self) -> None:
        cast(AppendedSlots, self._appended).remove()
        self._appended = None

    # Parts

    def _slots(self) -> list[SideSlots]:
        return list(self.slots)  # type: ignore[arg-type]

    def _filling(self, inputs: Tensor, mask: Tensor | None, run: Run | None) -> Filling:
        return Filling(self._feed_forwards, self._slots(), self.batch_size, inputs, mask, run or self.host)

    def _describe(self) -> dict[str, Any]:
        return {
            "sites": list(self.sites),
            "sizes": self._sizes,
            "gated": [site.gated for site in self._feed_forwards.values()],
            "activation": [fingerprint(site.activation) for site in self._feed_forwards.values()],
            "rank": self._slots()[0].slots,
            "batch_size": self.batch_size,
            "clip": self._slots()[0].clip,
        }

    def _part(self, index: int) -> Iterable[Tensor]:
        return cast(Iterable[Tensor], self.slots[index].state_dict(keep_vars=True).values())

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        for index, slots in enumerate(self._slots()):
            stored = tensors[f"slots.{index}.tau"].to(slots.tau)
            if not torch.allclose(stored, slots.tau, rtol=1e-5):
                warnings.warn(
                    f"tau={float(stored):.4g} of the file is not that of this host, {float(slots.tau):.4g}, at site "
                    f"{self.sites[index]!r}: the memory was made for other weights",
                    stacklevel=3,
                )
        super()._take(tensors)

    def _check_free(self, needed: int, remedy: str) -> int:
        if self.free < needed:
            raise ValueError(f"{needed} empty slots are needed, and {self.free} are left; {remedy}")
        return self.free


@register_layer("locas", "side")
def _build(host: nn.Module, **options: Any) -> Locas:
    return Locas.attach(host, **options)
