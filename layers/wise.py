"""WISE: a side memory of edits beside one matrix, and a router that decides who reads it.

Beside the matrix of values of one feed-forward lies a second one, which begins as a copy; only that is edited. How
differently the two respond tells whether a question is about an edit: if so, the second answers. Edits come in shards,
each of which may change a random part of the entries; finished shards are merged.

Here the side matrix is kept as a change ``dW`` of the main one, which is never written: ``y + a dW^T`` is read where
``|a dW^T|`` is above a threshold, and elsewhere ``y`` itself.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.edit_parts import find_edit_site
from memzoo.layers.editor import Answer, Edit, EditReport, check_edits
from memzoo.layers.feed_forward_site import matrix_of
from memzoo.layers.ops.precision import wider
from memzoo.layers.registry import register_layer
from memzoo.layers.wise_lesson import Lesson, Replayed, is_learned
from memzoo.layers.wise_options import WiseOptions
from memzoo.layers.wise_questions import derived_seed
from memzoo.layers.wise_sides import WiseSides

QUESTIONS, JOINED, REPLAY = range(1, 4)  # what seeds are derived for; masks have 0


class Wise(WiseSides):
    """Side memories beside the matrix of values of one feed-forward, each read by the inputs that it responds to.

    ``editor = Wise.attach(model)``, ``editor.calibrate(tokens)``, ``editor.edit([edit])``, then ``model(...)`` as ever.

    An edit is learned by the open shard, a change of the matrix that is zero outside its mask. When it is finished it
    is kept beside the next until enough are there to be merged. At any time what is read is, row by row, the side
    memory that responds most, of the merged ones, the finished shards and the open one, if it does so above its own
    threshold; else the host alone, to the bit. Reading changes nothing.

    A shard's threshold is the least response, after the last step of each edit, to any of its wordings. As later edits
    change what it responds to earlier ones, stored questions are measured again. Merging takes the least threshold.

    Which tokens of a row count is what ``answer(inputs, mask, asked=)`` or ``reading(counted)`` says; outside of both
    all do, padding too. A decision about whole rows is not causal: it depends on every token that counts.

    Args:
        host: The model.
        site: The feed-forward.
        options: What it can be told.
        answer: As in ``Editor``.
        seed: Of masks and draws.
        wrap: As in ``SideMemory``.

    Attributes:
        options: What it was told.
        site: The feed-forward.
        down: Its layer whose matrix has the side memories.
        delta: (out, in) the open shard, in at least float32; the only parameter.
        threshold: That of the open shard, inf without an edit.
        open_edits: How many edits are in the open shard.
        open_id: Its number.
        scale: What ``calibrate`` measured, 0 before.
        shards: Finished shards and merged memories.
        questions: What is stored of edits.

    Shape:
        The matrix reads (rows, ..., in) and returns (rows, ..., out).

    Note:
        A call that reads one token a row, after one with as many rows, keeps the decision of that: so a prompt decides
        for what is generated. ``new_prompt()`` forgets it; ``answer()`` and ``reading()`` do before and after. Prompts
        of one token need that; one that is read in pieces decides with each piece. Rows must keep their order: only
        beams of one prompt, which share its decision, may be swapped.

        The least response of a shard is measured. The same question in a batch of another shape may respond less by
        rounding, so that a threshold is less by one ``eps`` of what the product is computed in, 0.8 % in bfloat16; read
        in the precision that was edited in.

        Memory: the open shard, ``shards_per_merge`` finished ones, ``keep_shards`` merged ones, and one merged memory,
        or in mode "retrieve" one for every ``shards_per_merge`` shards, each as large as the matrix in float32; a mask
        of a byte an entry; and ``stored_questions`` for each shard not merged and each memory.

    Reference:
        Wang et al., arXiv 2405.14768. EasyEdit, easyeditor/models/wise, for what the paper leaves open.

    Example:
        >>> import torch
        >>> from memzoo.arch import create_model
        >>> from memzoo.layers import Wise
        >>> from memzoo.layers.editor import NOT_SCORED, Edit
        >>> model = create_model("transformer_tiny")
        >>> editor = Wise.attach(model, max_steps=2)
        >>> inputs = torch.tensor([[5, 6, 7, 8]])
        >>> targets = torch.tensor([[NOT_SCORED, NOT_SCORED, 8, 9]])
        >>> report = editor.edit([Edit(inputs, targets, unrelated=torch.tensor([[1, 2, 3]]))])
        >>> report.steps, int(editor.num_edits)
        (2, 1)
    """

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
        """Attach to a model, which is frozen.

        Args:
            model: The host: a model of ours, one of transformers, a ViT of timm, or any with feed-forwards that
                ``find_feed_forwards`` knows.
            site: Name of a feed-forward. By default that of layer ``round(0.84 * layers) - 1``, counted from 0, 26 of
                32 as in the paper.
            answer: As in ``Editor``.
            seed: Of masks and of what is drawn of stored questions.
            wrap: As in ``SideMemory``.
            **options: Of ``WiseOptions``.

        Raises:
            ValueError: An argument is out of range, or the model has no such feed-forward.
        """
        told = WiseOptions(**options)
        return cls(model, find_edit_site(model, site), told, answer=answer, seed=seed, wrap=wrap)._install()

    # Editing

    def edit(self, edits: Sequence[Edit]) -> EditReport:
        """Learn some edits together, in the open shard; a shard that is full by then is finished, and maybe merged.

        Raises:
            ValueError: They do not fit the host, the loss or a response is not finite, or the editor is merged or was
                detached. Whatever is raised, an interrupt too, everything is what it was then.
        """
        self._check_use("edit")
        check_edits(edits)
        with self.unchanged_on_error():
            if not isinstance(self.options.margins, Sequence) and not bool(self.scale):
                self._calibrate_on(edits[0])
            lessons = [Lesson(self, edit) for edit in edits]
            replayed = Replayed.draw(self, self.questions, self.options.replay, self._generator(REPLAY))
            report = self._train(lessons, replayed)
            self._take_up(lessons)
        self.new_prompt()
        return report

    def _take_up(self, lessons: Sequence[Lesson]) -> None:
        """Count edits that were trained, with their threshold and their questions, and finish the shard if it is full.

        Raises:
            ValueError: A response is not finite: the last step went too far, which no loss has seen.
        """
        least = torch.cat([lesson.activations() for lesson in lessons])
        if not bool(least.isfinite().all()):
            raise ValueError(
                f"the response to an edit is not finite after its last step; use a learning_rate below "
                f"{self.options.learning_rate}, or a norm_constraint"
            )
        self.threshold.copy_(self.threshold.minimum(least.min()))
        for lesson in lessons:
            x, counted = lesson.question()
            self.questions.offer(
                x,
                counted,
                int(self.open_id),
                before=int(self.open_edits),
                limit=self.options.stored_questions,
                generator=self._generator(QUESTIONS),
            )
            self.open_edits += 1
            self.num_edits += 1
        if self.options.refresh_threshold:
            self._refresh_open()
        if int(self.open_edits) >= self.options.edits_per_shard:
            self._finish()

    def _train(self, lessons: Sequence[Lesson], replayed: Replayed) -> EditReport:
        margins, frozen = self.margins(), self.frozen()
        make = self.options.optimizer or (lambda own: torch.optim.SGD(own, lr=self.options.learning_rate))
        optimizer = make([self.delta])
        steps, answer, last = 0, math.inf, math.inf
        try:
            for steps in range(1, self.options.max_steps + 1):
                with torch.enable_grad():
                    losses = torch.stack([torch.stack(lesson.losses(margins)) for lesson in lessons]).mean(0)
                    total = losses[1] + replayed.loss(self, margins)
                answer, loss = losses[0].item(), total.item()
                if is_learned(loss, last):
                    return EditReport(steps - 1, answer)
                if not math.isfinite(loss):
                    raise ValueError(
                        f"loss={loss} in step {steps} of an edit; use a learning_rate below "
                        f"{self.options.learning_rate}"
                    )
                (gradient,) = torch.autograd.grad(total, [self.delta])
                self.delta.grad = gradient.masked_fill_(frozen, 0)
                optimizer.step()
                self.constrain()
                last = loss
        finally:
            self.delta.grad = None
        return EditReport(steps, answer)

    @torch.no_grad()
    def calibrate(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Measure the scale of the host on generic inputs, for margins that are relative to it.

        It is the median of ``|a W^T|`` over real tokens. Without it the first edit measures on its unrelated questions,
        or on itself if it has none.

        Args:
            inputs: What the host reads.
            mask: (rows, time) bool, real tokens.

        Raises:
            ValueError: It is merged, or was detached.
        """
        self._check_use("calibrate")
        seen = self.see(inputs, mask)
        x = seen.x.flatten(0, 1) if seen.counted is None else seen.x[seen.counted]
        lengths = torch.linalg.vector_norm(wider(F.linear(x, matrix_of(self.down))), dim=-1)
        self.scale.copy_(lengths.sort().values[(len(lengths) - 1) // 2])

    def _calibrate_on(self, edit: Edit) -> None:
        if edit.unrelated is None:
            self.calibrate(edit.inputs, edit.mask)
        else:
            self.calibrate(edit.unrelated, edit.unrelated_mask)

    def margins(self) -> Tensor:
        """Return (alpha, beta, gamma); zeros where they are relative to a scale that is not measured yet."""
        told = self.options.margins
        if isinstance(told, Sequence):
            return self.scale.new_tensor(told)
        return self.scale * self.scale.new_tensor([told / 4, told, told / 2])

    # Shards

    @torch.no_grad()
    def refresh_thresholds(self) -> None:
        """Measure all stored questions again, and lower each threshold to the least of its own.

        ``refresh_threshold=True`` does so for the open shard after each edit, and for a memory that shards are merged
        into.
        """
        self._check_use("refresh_thresholds")
        self._refresh_open()
        for memory in self.shards.memory_id.tolist():
            self._refresh_memory(memory)

    def rollback(self, shard: int | None = None) -> None:
        """Forget the edits of a shard.

        Args:
            shard: Its number, counted from 0 in the order of the stream; the open one by default. ``shards.shard_id``
                has those of others that are kept.

        Raises:
            ValueError: It is not kept, or the editor is merged or was detached.
        """
        self._check_use("rollback")
        with self.unchanged_on_error():
            if shard is None or shard == int(self.open_id):
                shard, edits = int(self.open_id), int(self.open_edits)
                self._open()
            else:
                edits = self.shards.rollback(shard)
            self.questions.drop(self.questions.shard == shard)
            if self.options.refresh_threshold:
                for memory in self.shards.memory_id.tolist():
                    self._refresh_memory(memory)
            self.num_edits -= edits
        self.new_prompt()

    def reset(self) -> None:
        """Forget all edits, and the scale that was measured."""
        self._check_use("reset")
        self.shards.clear()
        self.questions.clear()
        self.scale.zero_()
        self.num_edits.zero_()
        self._open()
        self.new_prompt()

    @torch.no_grad()
    def _finish(self) -> None:
        """Keep the open shard and begin another."""
        self.shards.add(self.delta, self.open_id, threshold=self.threshold, edits=self.open_edits)
        if self.shards.is_full:
            memory = self.shards.merge()
            self.questions.join(memory, limit=self.options.stored_questions, generator=self._generator(JOINED))
            if self.options.refresh_threshold:
                self._refresh_memory(memory)
        self._open()

    @torch.no_grad()
    def _open(self) -> None:
        """Begin a shard."""
        self.delta.zero_()
        self.delta.grad = None
        self.threshold.fill_(math.inf)
        self.open_edits.zero_()
        self.open_id.fill_(self.shards.next_id())

    @torch.no_grad()
    def _refresh_open(self) -> None:
        self.threshold.copy_(self._least(self.questions.shard == self.open_id, self.delta, self.threshold))

    def _refresh_memory(self, memory: int) -> None:
        (place,) = (self.shards.memory_id == memory).nonzero().flatten().tolist()
        threshold = self.shards.memory_threshold[place]
        self.shards.lower(memory, self._least(self.questions.memory == memory, self.shards.memories[place], threshold))

    def _least(self, rows: Tensor, delta: Tensor, threshold: Tensor) -> Tensor:
        """Return a threshold, or the least response to some stored questions if that is less."""
        if not bool(rows.any()):
            return threshold
        seen = self.stored(self.questions.inputs[rows], self.questions.counted[rows])
        return threshold.minimum(self.response(seen, delta).min())

    def _generator(self, purpose: int) -> torch.Generator:
        """Return what draws at this place of the stream."""
        return torch.Generator().manual_seed(derived_seed(self.seed, purpose, int(self.num_edits)))


UNREAD = "nothing is read before an edit has set a threshold"
SKIPS = {
    "what_it_learnt_is_read": UNREAD,
    "only_the_memory_learns": UNREAD,
    "merged_it_says_what_it_said_beside": "merged, every input reads what it learned: there is no router then",
}


@register_layer("wise", "side", skips=SKIPS)
def _build(host: nn.Module, *, sites: Sequence[str] | None = None, **options: Any) -> Wise:
    """Attach it; ``sites``, as of other side memories, is of one name."""
    return Wise.attach(host, **options | ({} if sites is None else {"site": sites[0]}))
