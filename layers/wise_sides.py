"""What WISE reads: side memories beside one matrix, each by the inputs that respond to it; in a host, in files."""

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.edit_masks import disjoint_masks, edit_mask
from memzoo.layers.edit_parts import value_name
from memzoo.layers.editor import Answer, Editor
from memzoo.layers.feed_forward_site import FeedForwardSite, matrix_of
from memzoo.layers.ties import ties
from memzoo.layers.wise_lesson import Seen
from memzoo.layers.wise_options import WiseOptions
from memzoo.layers.wise_questions import WiseQuestions, derived_seed
from memzoo.layers.wise_routing import Indicator, Routing, mixed, slack
from memzoo.layers.wise_shards import WiseShards

MASKS = 0  # what seeds are derived for; others are in wise.py
TRAINING = ("learning_rate", "optimizer", "max_steps", "norm_constraint", "replay")  # files may differ in these


class WiseSides(Editor):
    """The side memories of ``Wise``, which says what they are; here they are read, merged into the host and filed."""

    site: FeedForwardSite
    down: Any
    threshold: Tensor
    open_edits: Tensor
    open_id: Tensor
    scale: Tensor

    def __init__(
        self,
        host: nn.Module,
        site: FeedForwardSite,
        options: WiseOptions,
        *,
        answer: Answer | None = None,
        seed: int = 0,
        wrap: bool = False,
    ) -> None:
        layer = site.down  # itself, which a wrapper is to replace
        super().__init__(host, {value_name(site): layer}, answer=answer, wrap=wrap)
        self.options, self.seed = options, seed
        self.__dict__.update(site=site, down=layer)  # no submodules
        weight = matrix_of(layer)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.delta = nn.Parameter(torch.zeros(weight.shape, dtype=dtype, device=weight.device))
        like = self.delta.detach()
        self.register_buffer("threshold", like.new_tensor(math.inf))
        self.register_buffer("scale", like.new_tensor(0.0))
        self.register_buffer("open_edits", torch.zeros((), dtype=torch.int64, device=weight.device))
        self.register_buffer("open_id", torch.zeros((), dtype=torch.int64, device=weight.device))
        self.shards = WiseShards(options, like)
        self.questions = WiseQuestions(weight.shape[1], weight.detach())
        self.indicator_of = Indicator(options.reduce, site.activation if options.indicator == "activated" else None)
        self._base: Tensor | None = None  # while merged, the host's weight as it was
        self._decision: Tensor | None = None  # of the last call, by row
        self._seen: list[tuple[Seen, Tensor]] | None = None  # while the open shard is read by force
        self._routings: list[Routing] | None = None  # while decisions are looked at
        self._frozen: tuple[int, Tensor] | None = None  # number of a shard, and what its mask leaves out

    # Reading

    def beside(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """Return ``y`` for inputs that respond to no side memory, for others what the one they respond to most says."""
        rows, out = x.reshape(len(x), -1, x.shape[-1]), y.reshape(len(y), -1, y.shape[-1])
        if self._seen is not None:
            z = _product(rows, self.delta)
            self._seen.append((Seen(rows.detach(), out.detach(), self._counts(rows)), z))
            return (out + z.to(y.dtype)).view_as(y)
        deltas, thresholds = self.sides()
        beside, kept = [_product(rows, delta) for delta in deltas], self._decision
        continues = self.options.sticky and x.dim() > 2 and rows.shape[1] == 1
        if continues and kept is not None and len(kept) == len(rows):
            return mixed(out, beside, kept).view_as(y)
        ratio = self.options.threshold_ratio * (1 - slack(beside[0].dtype))
        limits = thresholds * ratio if ratio else torch.zeros_like(thresholds)
        return mixed(out, beside, self._decide(out, beside, limits)).view_as(y)

    def sides(self) -> tuple[list[Tensor], Tensor]:
        """Return the side memories that are read, memories first and the open shard last, and their thresholds."""
        deltas, thresholds = self.shards.sides()
        return [*deltas, self.delta], torch.cat([thresholds, self.threshold[None]])

    def new_prompt(self) -> None:
        """Forget the last decision: the next call decides anew, if it reads one token a row too."""
        self._decision = None

    @contextmanager
    def _counting(self, counted: Tensor | None) -> Iterator[None]:
        """As in ``Editor``; no decision is kept from before, nor afterwards."""
        self.new_prompt()
        try:
            with super()._counting(counted):
                yield
        finally:
            self.new_prompt()

    @torch.no_grad()
    def routing(self, inputs: Tensor, mask: Tensor | None = None, *, asked: Tensor | None = None) -> Routing:
        """Return how each side memory responds to some inputs, and which is read; arguments are those of ``answer``.

        Raises:
            ValueError: It is merged, or was detached.
        """
        self._check_use("routing")
        before, self._routings = (self._enabled, self._routings), []
        self._enabled = True
        try:
            with self.calling_all():
                self.answer(inputs, mask, asked=asked)
            return self._routings[0]
        finally:
            self._enabled, self._routings = before

    def indicator(self, inputs: Tensor, mask: Tensor | None = None, *, asked: Tensor | None = None) -> Tensor:
        """Return the largest activation of any side memory, (rows,) of granularity "sample"; see ``routing``."""
        return self.routing(inputs, mask, asked=asked).activations.amax(0)

    def _decide(self, y: Tensor, beside: Sequence[Tensor], thresholds: Tensor) -> Tensor:
        granularity, counted = self.options.granularity, self._counts(y)
        activations = [self.indicator_of.of_call(y, z.detach(), counted, granularity) for z in beside]
        routing = Routing.decide(torch.stack(activations), thresholds)
        if self._routings is not None:
            self._routings.append(routing)
        if granularity != "token":
            self._decision = routing.chosen.expand(len(y))
        return routing.chosen

    # Seeing

    @contextmanager
    def seeing(self) -> Iterator[list[tuple[Seen, Tensor]]]:
        """Let every row read the open shard in the call inside; collect what the site reads, and what it adds."""
        before, seen = (self._enabled, self._seen), list[tuple[Seen, Tensor]]()
        self._enabled, self._seen = True, seen
        try:
            with self.calling_all():
                yield seen
        finally:
            self._enabled, self._seen = before

    @torch.no_grad()
    def see(self, inputs: Tensor, mask: Tensor | None) -> Seen:
        """Return what the site reads of some inputs."""
        with self.seeing() as seen:
            self.answer(inputs, mask)
        return seen[0][0]

    @torch.no_grad()
    def stored(self, x: Tensor, counted: Tensor) -> Seen:
        """Return stored questions as the site saw them."""
        x = x.to(self.down.weight.dtype)
        return Seen(x, F.linear(x, matrix_of(self.down), self.down.bias), counted)

    def response(self, seen: Seen, delta: Tensor | None = None) -> Tensor:
        """Return how far a side memory, the open shard by default, responds to what a site saw, (rows,)."""
        z = _product(seen.x, self.delta if delta is None else delta)
        return self.indicator_of.of_rows(seen.y, z, seen.counted)

    # The mask

    @torch.no_grad()
    def constrain(self) -> None:
        """Keep the open shard zero outside its mask, and within ``norm_constraint``; ``edit`` does after each step."""
        self.delta.masked_fill_(self.frozen(), 0)
        if (bound := self.options.norm_constraint) is not None:
            self.delta.clamp_(-bound, bound)

    def mask(self) -> Tensor:
        """Return which entries the open shard may change, (out, in) bool: the same for the same ``seed`` and shard."""
        return ~self.frozen()

    def frozen(self) -> Tensor:
        """Return what the mask leaves out; drawn once a shard."""
        number, options = int(self.open_id), self.options
        if self._frozen is None or self._frozen[0] != number or self._frozen[1].device != self.delta.device:
            group, place = divmod(number, options.shards_per_merge)
            shape = self.delta.shape
            if options.mask == "disjoint":
                seed = derived_seed(self.seed, MASKS, group)
                drawn = disjoint_masks(shape, options.mask_ratio, options.shards_per_merge, seed=seed)[place]
            else:
                seed = derived_seed(self.seed, MASKS, number)
                drawn = edit_mask(shape, options.mask_ratio, seed=seed, kind=options.mask)
            self._frozen = number, ~drawn.to(self.delta.device)
        return self._frozen[1]

    # In the host's weights

    def merge(self) -> None:
        """Write what was learned into the host's matrix: every input reads it then, and nothing is routed.

        Of several side memories it is what Ties makes of them, with equal weights; what was merged before is not
        trimmed again. ``unmerge`` takes it out, to the bit: a copy of the matrix is kept until then.

        Raises:
            ValueError: There is nothing to write, or it is merged already or was detached.
        """
        super().merge()
        if self.options.threshold_ratio:
            warnings.warn(
                "merge() of WISE: without its router, edits reach inputs that have nothing to do with them",
                stacklevel=2,
            )

    @torch.no_grad()
    def _append(self) -> None:
        deltas, thresholds = self.sides()
        densities = [1.0 if n < len(self.shards.memories) else self.options.density for n in range(len(deltas))]
        routed = self.options.threshold_ratio > 0  # else every one is read that is not empty
        known = thresholds.isfinite().tolist() if routed else [bool(delta.any()) for delta in deltas]
        every = zip(deltas, densities, known, strict=True)
        read = [(delta.detach(), density) for delta, density, knows in every if knows]
        if not read:
            raise ValueError("merge() of an editor without edits, which has nothing to write; edit() first")
        whole = read[0][0]
        if len(read) > 1:
            whole = ties([d for d, _ in read], [1 / len(read)] * len(read), density=[share for _, share in read])
        weight = matrix_of(self.down)
        self._base = weight.detach().clone()
        weight.copy_(weight.to(whole) + whole)

    @torch.no_grad()
    def _remove(self) -> None:
        assert self._base is not None
        matrix_of(self.down).copy_(self._base)
        self._base = None

    # All or nothing

    @contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """Leave everything that is learned as it was if what is done inside raises, an interrupt too.

        It takes a copy of the open shard and of single numbers; what has rows is replaced when it changes.
        """
        own = {name: tensor for name, tensor in self.state_dict(keep_vars=True).items() if "." not in name}
        written = [(tensor, tensor.detach().clone()) for tensor in (*own.values(), self.shards.merges)]
        kept = [(part, name, buffer) for part in (self.shards, self.questions) for name, buffer in part.named_buffers()]
        try:
            yield
        except BaseException:
            for part, name, buffer in kept:
                setattr(part, name, buffer)
            with torch.no_grad():
                for tensor, before in written:
                    tensor.copy_(before)
            self.shards.note()
            self.new_prompt()
            raise

    # Files

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read a file, as in ``SideMemory``, with as many shards and memories as it holds."""
        parts = {"shards.": self.shards, "questions.": self.questions}
        before = [dict(part.named_buffers()) for part in parts.values()]
        shapes = _shapes(path)
        for prefix, part in parts.items():
            part.fit({name.removeprefix(prefix): own for name, own in shapes.items() if name.startswith(prefix)})
        try:
            super().load(path)
        except BaseException:
            for part, buffers in zip(parts.values(), before, strict=True):
                for name, buffer in buffers.items():
                    setattr(part, name, buffer)
            raise

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.new_prompt()

    def _describe(self) -> dict[str, Any]:
        own = self.options
        told = {name: value for name, value in vars(own).items() if name not in TRAINING}
        told["margins"] = [*own.margins] if isinstance(own.margins, Sequence) else own.margins
        return {"sites": list(self.sites), "shape": [*self.delta.shape], "seed": self.seed, **told}


def _product(x: Tensor, delta: Tensor) -> Tensor:
    return F.linear(x, delta.to(x.dtype))


def _shapes(path: str | os.PathLike[str]) -> Mapping[str, Sequence[int]]:
    """Return the shapes of what is in a file; nothing of one that cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError):
        return {}
