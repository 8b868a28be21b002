"""Filling: one call of a host, from which the empty slots beside its feed-forwards are filled."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from memzoo.layers.feed_forward_site import FeedForwardSite
from memzoo.layers.locas_init import Init, choose, clones, importance, output_gradients, recording, spread
from memzoo.layers.ops.precision import wider
from memzoo.layers.side_slots import WRITTEN, SideSlots


@dataclass(frozen=True)
class Filling:
    """A call of a host, and the slots that it fills.

    Attributes:
        sites: The feed-forwards, by name.
        slots: Beside each of them.
        batch_size: Rows of the batch that have slots of their own; None for slots that all share.
        mask: (batch, tokens) bool, which tokens count; None for all.
        call: Calls the host, returns what it does.
    """

    sites: Mapping[str, FeedForwardSite]
    slots: Sequence[SideSlots]
    batch_size: int | None
    mask: Tensor | None
    call: Callable[[], Any]

    def clone(self, count: int, init: Init, seed: int) -> None:
        """Fill slots with clones of the host's."""
        generator = torch.Generator().manual_seed(seed)
        for slots, site, hidden in zip(self.slots, self.sites.values(), self._recorded("hidden"), strict=True):
            counted = None if self.mask is None else self._counted(self._rows(hidden)).view(hidden.shape[:-1])
            score = importance(hidden, counted, per_row=self.batch_size is not None)
            if init == "topk_contribution":
                score = score * torch.linalg.vector_norm(wider(site.down_weight), dim=0)
            if init == "random_clone":
                score = torch.rand(score.shape, generator=generator).to(score.device)
            rows = choose(score, count, slots.rows, least=init == "bottomk")
            slots.fill(rows, **clones(site, rows))

    def draw(self, count: int, seed: int) -> None:
        """Fill slots with directions drawn by chance; the host is not called."""
        generator = torch.Generator().manual_seed(seed)
        for slots in self.slots:
            drawn = {}
            for name, parameter in (("key", slots.key), ("gate", slots.gate)):
                if parameter is not None:  # those of all slots: what expand() added gets others than there are
                    every = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    drawn[name] = _unit(every[..., -count:, :])
            slots.fill(self._written(slots, count), **drawn)

    def read(self, count: int) -> None:
        """Fill slots with what the feed-forwards read at evenly spread tokens."""
        for slots, x in zip(self.slots, self._recorded("input"), strict=True):
            rows = self._rows(x)
            keys = self._shape(_unit(wider(_take(rows, spread(self._counted(rows), count, "activation")))))
            gate = {} if slots.gate is None else {"gate": keys}
            slots.fill(self._written(slots, count), key=keys, **gate)

    def write(
        self,
        count: int | Callable[[int], int],
        log_likelihood: Callable[[Any], Tensor],
        *,
        eps: float = 1.0,
        per_token: bool = False,
    ) -> None:
        """Fill slots with what the feed-forwards read and the direction in which the text gets likelier.

        Args:
            count: How many evenly spread tokens; or, for all that count, a function that checks their number.
            log_likelihood: Of every token, from what the host returns.
            eps: Length of a token's values over all sites.
            per_token: As in ``Locas.write``.
        """
        with torch.enable_grad(), recording(self.sites, "output") as outputs:
            with recording(self.sites, "input") as inputs:
                result = self.call()
            keys = [self._rows(x.detach()) for x in self._called(inputs)]
            counted = self._counted(keys[0])
            number = count if isinstance(count, int) else count(_same(counted.sum(1)))
            picked = spread(counted, number, "gradient")
            # A copy: where the host computes its blocks again in the backward pass, they are recorded again.
            gradients = output_gradients(list(self._called(outputs)), log_likelihood(result), per_token=per_token)
        for slots, key, gradient in zip(self.slots, keys, gradients, strict=True):
            value = eps * _take(self._rows(gradient), picked)
            own = self._shape(_unit(wider(_take(key, picked))))
            slots.fill(self._written(slots, number), key=own, value=self._shape(value))

    def _recorded(self, part: Literal["input", "hidden"]) -> list[Tensor]:
        with torch.no_grad(), recording(self.sites, part) as seen:
            self.call()
        return self._called(seen)

    def _called(self, seen: list[Any]) -> list[Tensor]:
        for name, tensor in zip(self.sites, seen, strict=True):
            if tensor is None:
                raise ValueError(
                    f"site {name!r} was not called by the host; attach to others: attach(model, sites=[...])"
                )
        return seen

    def _rows(self, x: Tensor) -> Tensor:
        """Return what a site reads as (rows that have a memory, tokens, dim)."""
        return x.flatten(0, -2)[None] if self.batch_size is None else x.flatten(1, -2)

    def _shape(self, tensor: Tensor) -> Tensor:
        return tensor[0] if self.batch_size is None else tensor

    def _counted(self, rows: Tensor) -> Tensor:
        if self.mask is None:
            return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        if self.mask.numel() != rows.shape[:2].numel():
            raise ValueError(
                f"mask has shape {tuple(self.mask.shape)}, for {rows.shape[:2].numel()} tokens that the feed-forwards "
                f"read; pass (batch, tokens)"
            )
        return self.mask.reshape(rows.shape[:2]).to(rows.device)

    def _written(self, slots: SideSlots, count: int) -> Tensor:
        return slots.rows.new_full((*slots.rows.shape[:-1], count), WRITTEN)


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
