"""Filling: one call of a host, from which the empty slots beside its feed-forwards are filled."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from memzoo.layers.feed_forward_site import FeedForwardSite
from memzoo.layers.locas_init import (
    Init,
    LogLikelihood,
    choose,
    clones,
    next_token_log_likelihood,
    output_gradients,
    recording,
    spread,
    usage,
)
from memzoo.layers.ops.precision import wider
from memzoo.layers.side_memory import Run
from memzoo.layers.side_slots import WRITTEN, SideSlots, check_rows


@dataclass(frozen=True)
class Filling:
    """A call of a host, and the slots that it fills.

    Attributes:
        sites: The feed-forwards, by name.
        slots: Beside each of them.
        batch_size: Rows of the batch that have slots of their own; None for slots that all share.
        inputs: What the host reads.
        mask: (batch, tokens) bool, which tokens of a call count; None for all.
        run: Calls the host, ``run(inputs)``.
    """

    sites: Mapping[str, FeedForwardSite]
    slots: Sequence[SideSlots]
    batch_size: int | None
    inputs: Tensor
    mask: Tensor | None
    run: Run

    def __post_init__(self) -> None:
        _check_text(self.inputs, self.mask, self.batch_size)

    def clone(self, count: int, init: Init, seed: int) -> None:
        """Fill slots with clones of the host's; of what it computes only sums are kept."""
        sums = dict[str, tuple[Tensor, Tensor]]()

        def add(name: str, hidden: Tensor) -> None:
            rows = self._rows(hidden)
            used, number = usage(rows, self._counted(rows, hidden))
            before = sums.get(name, (0, 0))
            sums[name] = before[0] + used, before[1] + number

        with torch.no_grad(), recording(self.sites, "hidden", add):
            self.run(self.inputs)
        self._check_called(sums)
        generator = torch.Generator().manual_seed(seed)
        for slots, (name, site) in zip(self.slots, self.sites.items(), strict=True):
            total, number = sums[name]
            score = self._shape(total / number)
            if init == "topk_contribution":
                score = score * torch.linalg.vector_norm(wider(site.down_weight), dim=0)
            if init == "random_clone":
                score = torch.rand(score.shape, generator=generator, device="cpu").to(score.device)
            rows = choose(score, count, slots.rows, least=init == "bottomk")
            slots.fill(rows, **clones(site, rows))

    def draw(self, count: int, seed: int) -> None:
        """Fill slots with directions drawn by chance; the host is not called."""
        generator = torch.Generator().manual_seed(seed)
        for slots in self.slots:
            drawn = {}
            for name, parameter in (("key", slots.key), ("gate", slots.gate)):
                if parameter is not None:  # those of all slots: what expand() added gets others than there are
                    every = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
                    drawn[name] = _unit(every[..., -count:, :])
            slots.fill(self._written(slots, count), **drawn)

    def read(self, count: int) -> None:
        """Fill slots with what the feed-forwards read at evenly spread tokens."""
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

        def keep(name: str, x: Tensor) -> None:
            rows = self._rows(x)
            seen.setdefault(name, []).append((rows, self._counted(rows, x)))

        with torch.no_grad(), recording(self.sites, "input", keep):
            self.run(self.inputs)
        self._check_called(seen)
        for slots, name in zip(self.slots, self.sites, strict=True):
            rows, counted = (torch.cat(pieces, 1) for pieces in zip(*seen[name], strict=True))
            keys = self._shape(_unit(wider(_take(rows, spread(counted, count, "activation")))))
            gate = {} if slots.gate is None else {"gate": keys}
            slots.fill(self._written(slots, count), key=keys, **gate)

    def write(
        self,
        count: int | Callable[[int], int],
        log_likelihood: LogLikelihood | None,
        *,
        eps: float = 1.0,
        per_token: bool = False,
    ) -> None:
        """Fill slots with what the feed-forwards read and the direction in which the text gets likelier.

        Args:
            count: How many evenly spread tokens; or, for all that count, a function that checks their number.
            log_likelihood: As in ``Locas.write``.
            eps: Length of a token's values over all sites.
            per_token: As in ``Locas.write``.
        """
        inputs: dict[str, list[Tensor]] = {name: [] for name in self.sites}
        outputs: dict[str, list[Tensor]] = {name: [] for name in self.sites}

        def keep(name: str, y: Tensor) -> None:
            outputs[name] = [*outputs[name][:1], y]

        # It goes on in the backward pass, where a host may compute its blocks again and must do the same as before.
        with torch.enable_grad(), recording(self.sites, "output", keep):
            with recording(self.sites, "input", lambda name, x: inputs[name].append(x.detach())):
                result = self.run(self.inputs)
            xs, ys = self._once(inputs), self._once(outputs)
            keys = [self._rows(x) for x in xs]
            counted = self._counted(keys[0], xs[0])
            number = count if isinstance(count, int) else count(_same(counted.sum(1)))
            picked = spread(counted, number, "gradient")
            likelihood = log_likelihood or partial(next_token_log_likelihood, mask=self.mask)
            gradients = output_gradients(ys, likelihood(result, self.inputs), per_token=per_token)
        for slots, key, gradient in zip(self.slots, keys, gradients, strict=True):
            value = eps * _take(gradient.view(key.shape), picked)
            own = self._shape(_unit(wider(_take(key, picked))))
            slots.fill(self._written(slots, number), key=own, value=self._shape(value))

    def _once(self, seen: Mapping[str, list[Tensor]]) -> list[Tensor]:
        self._check_called({name for name, calls in seen.items() if calls})
        for name, calls in seen.items():
            if len(calls) > 1:
                raise ValueError(
                    f"site {name!r} was called several times, and what is written comes from one call; let run() call "
                    f"the host once, with all of the text"
                )
        return [calls[0] for calls in seen.values()]

    def _check_called(self, seen: Container[str]) -> None:
        for name in self.sites:
            if name not in seen:
                raise ValueError(
                    f"site {name!r} was not called by the host; attach to others: attach(model, sites=[...])"
                )

    def _rows(self, x: Tensor) -> Tensor:
        """Return what a site reads as (rows that have a memory, tokens, dim)."""
        if self.batch_size is None:
            return x.flatten(0, -2)[None]
        check_rows(x, self.batch_size)
        return x.flatten(1, -2)

    def _shape(self, tensor: Tensor) -> Tensor:
        return tensor[0] if self.batch_size is None else tensor

    def _counted(self, rows: Tensor, x: Tensor) -> Tensor:
        """Return which tokens count, (rows, tokens); ``x`` is what the site read as it came."""
        if self.mask is None:
            return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        wanted = x.flatten(1, -2).shape[:2] if x.dim() > 2 else None  # rows of (tokens, dim) are not known
        if self.mask.numel() != rows.shape[:2].numel() or wanted not in (None, self.mask.shape):
            raise ValueError(
                f"mask has shape {tuple(self.mask.shape)}, for {rows.shape[:2].numel()} tokens that the feed-forwards "
                f"read in a call ({tuple(x.shape)}); pass (batch, tokens), and where run() calls the host in pieces "
                f"none"
            )
        return self.mask.bool().reshape(rows.shape[:2]).to(rows.device)

    def _written(self, slots: SideSlots, count: int) -> Tensor:
        return slots.rows.new_full((*slots.rows.shape[:-1], count), WRITTEN)


def _check_text(inputs: Tensor, mask: Tensor | None, batch_size: int | None) -> None:
    """Require something to read.

    Raises:
        ValueError: There is nothing to read, not as many rows as memories, or ``mask`` is not (batch, tokens), not of
            0 and 1, or counts nothing in a row.
    """
    if not inputs.numel():
        raise ValueError(f"inputs has shape {tuple(inputs.shape)}, in which there is nothing to read; pass some text")
    if batch_size not in (None, len(inputs)):
        raise ValueError(
            f"inputs has {len(inputs)} rows, and there are memories for batch_size={batch_size}; pass as many"
        )
    if mask is None:
        return
    if mask.dim() != 2 or len(mask) != len(inputs):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, for {len(inputs)} rows of inputs; pass (batch, tokens)")
    if mask.is_floating_point():
        raise ValueError(f"mask has dtype {mask.dtype}; pass bool, or integers that are 0 where nothing counts")
    if not bool(mask.any(1).all()):
        raise ValueError("mask counts nothing in one of its rows; leave the row out")


def _same(counts: Tensor) -> int:
    least, most = int(counts.min()), int(counts.max())
    if least < most:
        raise ValueError(
            f"mask counts {least} tokens in one row and {most} in another, and the memories of all rows have as many "
            f"slots; count as many tokens in each row"
        )
    return most


def _unit(vectors: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(lengths > 0, lengths, 1)


def _take(rows: Tensor, places: Tensor) -> Tensor:
    """Return (rows, count, dim) of (rows, tokens, dim) at ``places`` (rows, count)."""
    return rows.gather(1, places[..., None].expand(*places.shape, rows.shape[-1]))
