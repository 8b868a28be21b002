"""ROME: a fact written into one matrix in closed form; and MEMIT in one layer, several at once.

The matrix ``W`` that holds a feed-forward's values is an associative memory, ``v = W k``. A fact is a pair: the key
``k*`` that the matrix reads where a question names its subject, and the value ``v*`` that makes the host answer it.
"""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from memzoo.layers.call_replay import CallReplay
from memzoo.layers.edit_parts import acting, find_edit_site, value_name
from memzoo.layers.editor import Answer, Edit, Editor, EditReport, check_edits
from memzoo.layers.feed_forward_site import FeedForwardSite, matrix_of
from memzoo.layers.registry import register_layer
from memzoo.layers.rome_changes import RomeChanges, shapes_in
from memzoo.layers.rome_lesson import Learnt, Seen, check_counted, learn
from memzoo.layers.rome_options import RomeOptions
from memzoo.layers.rome_solve import MeanSquare
from memzoo.layers.side_memory import Run


class Rome(Editor):
    """Rank-one changes of the matrix that holds a feed-forward's values, each solved for: ``y = W x + b + D x``.

    An edit has a key ``k*``, the mean over its wordings of what the matrix reads at the key token, and a value
    ``v* = W k* + b + d``. ``d`` is found by Adam, added to the output at that token: the loss of the answer, plus
    ``kl_weight`` times ``KL(after || before)`` of what the host says at the ends of the edit's unrelated questions,
    plus ``weight_decay |d| / |W k* + b|^2``; after each step it is cut to ``clamp |W k* + b|``. Then, with
    ``C = E[k k^T]``,

        D <- D + d (C^-1 k*)^T / (k*^T C^-1 k*)

    which gives ``v*`` at ``k*`` and, of all changes that do, moves least what other keys give. ``C`` is the identity
    until ``fit_covariance`` has seen texts. The key token is the last of the edit's subject if it has one, otherwise
    the last of the question; ``token="first"`` has the class token of a vision transformer.

    **Several edits in one call.** With ``ridge=0`` they are written one after the other, as ROME is: each finds its
    value with those before it in place, and may be asked what one of them was. With ``ridge`` above 0 it is MEMIT in
    one layer: every value is found by itself, its divergence that of the change it would be if it were written alone;
    then all are written by one least-squares solution, a column of ``R`` and of ``K`` an edit:
    ``D <- D + R K^T (ridge C + K K^T)^-1``.

    ``D`` is kept beside the host as its factors, ``width + dim`` numbers an edit in at least float32 (float64 stays);
    the solutions are of float64. ``merge`` alone writes the host's matrix, and keeps a copy until ``unmerge`` puts it
    back. ``undo`` takes back the last call, to the bit. The trained ``changes.values`` is another parameter whenever
    the number of edits changes, and the same if an edit fails. Put the host into ``eval()``: dropout would move the
    keys.

    What differs from the authors' code: a change is scaled to ``k*``, as in the paper, and there to the key of the
    first wording alone; of an unrelated question, every token is moved by what the change will do there, so that any
    question can be given, and there one token of a sentence about the subject is, by all of ``d``; MEMIT there shares
    ``d`` among several layers.

    Args:
        host: The model.
        site: The feed-forward.
        options: What it can be told.
        answer: As in ``Editor``.
        wrap: As in ``SideMemory``.

    Attributes:
        options: What it was told.
        changes: Factors of ``D``, and the covariance.

    Raises:
        ValueError: As ``SideMemory``.

    Reference:
        Meng et al., arXiv 2202.05262, section 3.1; Meng et al., arXiv 2210.07229, section 4.2.

    Example:
        >>> import torch
        >>> from memzoo.arch import create_model
        >>> from memzoo.layers.editor import Edit
        >>> _ = torch.manual_seed(2)
        >>> model = create_model("transformer_tiny").eval()
        >>> editor = Rome.attach(model)
        >>> question, answer = torch.tensor([[5, 6, 7]]), torch.tensor([[-100, -100, 9]])
        >>> report = editor.edit([Edit(question, answer)])
        >>> int(model(question)[0][0, -1].argmax())
        9
    """

    def __init__(
        self, host: nn.Module, site: FeedForwardSite, options: RomeOptions, *, answer: Answer | None, wrap: bool
    ) -> None:
        layer, weight = site.down, site.down_weight  # once wrapped, the site has a wrapper there
        super().__init__(host, {value_name(site): layer}, answer=answer, wrap=wrap)
        self.options = options
        self.changes = RomeChanges(*weight.shape, like=weight)
        self.to(weight.device)
        self.register_load_state_dict_post_hook(_count)  # type: ignore[no-untyped-call]
        self._layer = [layer]  # not a submodule
        self._base: Tensor | None = None  # while merged, the host's matrix as it was
        self._noting, self._seen = False, cast(Seen | None, None)  # what the last call read, while that is noted
        self._trial: Callable[[Tensor], Tensor] | None = None  # what an edit that is being learnt adds

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        *,
        site: str | None = None,
        answer: Answer | None = None,
        seed: int = 0,
        wrap: bool = False,
        **options: Any,
    ) -> Self:
        """Attach to a model, with no edits.

        Args:
            model: The host, which is frozen.
            site: Name of a feed-forward; by default that of layer ``round(0.84 * layers) - 1``, from 0.
            answer: As in ``Editor``.
            seed: As all editors have; nothing is drawn.
            wrap: As in ``SideMemory``.
            **options: Of ``RomeOptions``.

        Raises:
            ValueError: The site is missing or not recognised, an option is out of range, or as ``SideMemory``.
        """
        told = RomeOptions(**options)
        return cls(model, find_edit_site(model, site), told, answer=answer, wrap=wrap)._install()

    def beside(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """Return ``y + D x``."""
        if len(self.changes):
            y = y + self.changes(x).to(y.dtype)
        if self._noting:
            self._seen = Seen(x.detach(), y.detach())
        return y if self._trial is None else y + self._trial(x).to(y.dtype)

    # Writing

    def edit(self, edits: Sequence[Edit]) -> EditReport:
        """Learn some edits, each in all of its wordings.

        Raises:
            ValueError: As ``check_edits``; nothing that is asked depends on the key token, a key is zero, or the loss
                does not stay finite; or the editor is merged or was detached. The edits are then those from before.
        """
        self._check_use("edit")
        check_edits(edits)
        before, call, found = self.changes.tables(), self.changes.next_call, list[Learnt]()
        try:
            with acting(self):
                for group in [edits] if self.options.ridge else [[edit] for edit in edits]:
                    own = [learn(self, edit) for edit in group]
                    keys, values = torch.stack([one.key for one in own]), torch.stack([one.value for one in own])
                    self.changes.write(keys, values, ridge=self.options.ridge, call=call)
                    found += own
        except BaseException:
            self.changes.restore(before)
            raise
        self.num_edits.fill_(len(self.changes))
        return EditReport(sum(one.steps for one in found), sum(one.loss for one in found) / len(found))

    def memorize(self, inputs: Tensor, *, mask: Tensor | None = None, run: Run | None = None) -> None:
        """Add an edit for each row that changes nothing, at its key: an optimiser may move its value.

        Args:
            inputs: What the host reads.
            mask: (rows, tokens) bool, which tokens count; all by default.
            run: Calls the host; by default ``answer(inputs, mask)``.

        Raises:
            ValueError: As in ``SideMemory``, the mask is none of the inputs, a row of it counts no token, or a key is
                zero. The edits are then those from before.
        """
        self._check_use("memorize")
        check_counted("mask", inputs, mask)
        with acting(self):
            seen = self.see(partial(self.answer, inputs, mask) if run is None else partial(run, inputs))
        keys, ridge = seen.x[seen.key_tokens(self.sites[0], mask, self.options.token)], self.options.ridge
        values, call = seen.y.new_zeros(len(keys), seen.y.shape[-1]), self.changes.next_call
        before = self.changes.tables()
        try:
            for rows in [slice(None)] if ridge else [slice(row, row + 1) for row in range(len(keys))]:
                self.changes.write(keys[rows], values[rows], ridge=ridge, call=call)
        except BaseException:
            self.changes.restore(before)
            raise
        self.num_edits.fill_(len(self.changes))

    def fit_covariance(self, batches: Iterable[Tensor | Sequence[Tensor | None]]) -> None:
        """Estimate ``C`` from what the matrix reads at all real tokens, a batch at a time, for edits to come.

        Args:
            batches: What the host reads, or tuples or lists of that and, if there is one, a mask (rows, tokens) bool of
                real tokens.

        Raises:
            ValueError: A batch is none of these, a mask is none of its inputs, or a row of it counts no token; the
                estimate has no inverse, as where there are fewer tokens than the matrix is wide; the editor
                is merged or was detached; or it is called inside of ``torch.inference_mode``. The covariance is then
                that from before.
        """
        self._check_inference("fit_covariance")
        self._check_use("fit_covariance")
        estimate = MeanSquare(self.changes.directions.shape[1], self.changes.directions.device)
        with acting(self):
            for number, batch in enumerate(batches):
                inputs, mask = _split(number, batch)
                x = self.see(partial(self.answer, inputs, mask)).x
                if mask is not None and mask.shape != x.shape[:-1]:
                    raise ValueError(
                        f"batches[{number}] has a mask of shape {tuple(mask.shape)}, and site {self.sites[0]!r} reads "
                        f"a tensor of shape {tuple(x.shape)}; pass a mask of those tokens, or texts without padding"
                    )
                estimate.add(x.flatten(0, -2) if mask is None else x[mask.to(x.device)])
        self.changes.covariance_factor = estimate.factor()

    def undo(self) -> None:
        """Forget what the last call of ``edit`` or ``memorize`` wrote: what is left is what was before it, to the bit.

        Where an optimiser moved the values in between, those that are left stay as it moved them.

        Raises:
            ValueError: There is nothing to forget, or the editor is merged or was detached.
        """
        self._check_use("undo")
        if not len(self.changes):
            raise ValueError("undo() of an editor that holds no edits; edit() comes first")
        self.changes.undo()
        self.num_edits.fill_(len(self.changes))

    def reset(self) -> None:
        """Forget all edits. The covariance, which is of the host and says nothing of them, stays.

        Raises:
            ValueError: The editor is merged or was detached.
        """
        self._check_use("reset")
        self.changes.clear()
        self.num_edits.zero_()

    # Parts

    def replay(self) -> CallReplay:
        """Return what runs the host again from the site on."""
        return CallReplay(self.host, self._layer[0])

    def see(self, run: Callable[[], object]) -> Seen:
        """Return what the site reads and says in a call of the host.

        Raises:
            ValueError: It is not called.
        """
        self._noting = True
        try:
            with torch.no_grad(), self.calling_all():
                run()
            return cast(Seen, self._seen)
        finally:
            self._noting, self._seen = False, None

    @contextmanager
    def trying(self, added: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Add inside what is a function of what the site reads."""
        self._trial = added
        try:
            yield
        finally:
            self._trial = None

    def load(self, path: str | os.PathLike[str]) -> None:
        """As in ``SideMemory``; of any number of edits, with a covariance or without."""
        self._check_use("load")
        shapes, before, number = shapes_in(path, "changes."), self.changes, int(self.num_edits)
        if said := before.fault(shapes):
            raise ValueError(f"path={os.fspath(path)!r} {said}; attach to a host like that of the file, or save anew")
        try:
            self.changes = copy.deepcopy(before)
            self.changes.make_room(shapes)
            super().load(path)
        except BaseException:
            self.changes = before
            self.num_edits.fill_(number)
            raise

    def _describe(self) -> dict[str, Any]:
        return {"sites": list(self.sites), "token": self.options.token, "ridge": self.options.ridge}

    @torch.no_grad()
    def _append(self) -> None:
        weight = matrix_of(self._layer[0])
        self._base = weight.clone()
        weight.copy_(weight.to(self.changes.values) + self.changes.matrix)

    @torch.no_grad()
    def _remove(self) -> None:
        matrix_of(self._layer[0]).copy_(cast(Tensor, self._base))
        self._base = None


def _count(rome: Rome, _: object) -> None:
    """Count what was loaded: what did not fit was not."""
    rome.num_edits.fill_(len(rome.changes))


def _split(number: int, batch: Any) -> tuple[Tensor, Tensor | None]:
    """Return what the host reads of a batch, and its mask."""
    inputs, mask = batch, None
    if isinstance(batch, tuple | list) and len(batch) in (1, 2):
        inputs, mask = (*batch, None)[:2]
    if not isinstance(inputs, Tensor) or not isinstance(mask, Tensor | None):
        raise ValueError(f"batches[{number}] is of type {type(batch).__name__}; pass a tensor, or (tensor, mask)")
    check_counted(f"the mask of batches[{number}]", inputs, mask)
    return inputs, mask


@register_layer("rome", "side")
def _build(host: nn.Module, *, sites: Sequence[str] | None = None, **options: Any) -> Rome:
    """Attach to the one site that is named."""
    return Rome.attach(host, site=None if sites is None else sites[0], **options)
