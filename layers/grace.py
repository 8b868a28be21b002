"""GRACE: edits of a model as entries of a codebook beside one layer, each for what lies near enough to its key.

A row asks with what the layer reads at the last token of its question, ``q``. The nearest key ``k_i`` answers if ``q``
lies within its radius, ``|q - k_i| <= e_i``: its value ``v_i`` stands in the place of what the layer returns. An edit
adds an entry for its question, or widens one that gives the same answer already, and trains the value.
"""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from memzoo.layers.call_replay import CallReplay
from memzoo.layers.codebook import Codebook, draw_value, file_sizes
from memzoo.layers.edit_parts import acting, find_edit_site, value_name
from memzoo.layers.editor import NOT_SCORED, Answer, Edit, Editor, EditReport, answer_loss, check_edits
from memzoo.layers.errors import check_choice, check_number, check_positive
from memzoo.layers.feed_forward_site import FeedForwardSite
from memzoo.layers.registry import register_layer
from memzoo.layers.side_memory import Run

Init = Literal["cold", "warm"]
Replace = Literal["last", "prompt", "all"]
Token = Literal["last", "first"]
SKIPS = {"merged_it_says_what_it_said_beside": "no weights do what depends on how near an input is"}


class Grace(Editor):
    """A codebook beside the layer that holds a feed-forward's values: keys, radii, and values that are trained.

    ``editor = Grace.attach(model)``, ``editor.edit([edit])``, then ``model(...)`` as ever. Of an edit it learns the
    first row, the question itself. What no key is near to is what it was, to the bit.

    **Writing.** ``q`` is the edit's question, ``i`` the nearest entry, ``d`` their distance. If there is none, or
    ``d > radius + e_i``, an entry is added, with ``radius``. Else, if ``i`` has the same answer, its value is trained
    again and its radius becomes ``d`` if that is more. Else an entry is added and the space between the two is split:
    ``e_i = d / 2 - 1e-5``, and ``d / 2`` for the new one; but if that is less than what rounding may move a key by
    (``rounding_of``, the least of any radius), entry ``i`` gets the new answer and a new value. Answers are the same if
    their labels are; without a label, if all targets are. Between entries that are equally near the newest answers.

    **Reading.** ``replace`` says whose output becomes the value in a row that has found an entry: "last" that of the
    token that asked, the last one that counts (``Editor.reading``); "prompt" that of the tokens that count before it;
    "all" that of every token. Only "last" is causal, where texts end with the question: the others change tokens before
    the one that decides. What follows a token is moved by layers above the site alone, so that in the last layer "last"
    can say one token of an answer, and "prompt" none.

    **Generating.** A call of one token a row continues the row: with ``sticky`` the entry found in the last call of
    several stays chosen, or none, and the token's output is replaced under "all" alone: what is read is what was
    trained. Rows must keep their places; ``reading`` and ``answer`` start anew. Without ``sticky`` the token is a
    question of its own. Without a cache, say in ``reading`` which tokens are the question: those behind it do not ask.

    An entry takes ``width + dim`` numbers in at least float32 (float64 stays), and an edit of an entry that is there
    ``dim`` for its old value, so that ``delete`` can bring it back, and a few bytes each. The trained
    ``codebook.values`` is another parameter whenever the number of entries changes. Put the host into ``eval()``:
    dropout would move the keys.

    Args:
        host: The model.
        site: The feed-forward.
        radius: Of new entries.
        replace: Whose output becomes the value.
        token: Which counted token asks: the "last", or the "first" for the class token of a vision transformer.
        init: New values, "cold" uniform in [0, 1), "warm" what the layer returned.
        steps: Of Adam, an edit.
        learning_rate: Of Adam.
        sticky: Whether calls of one token keep the entry.
        answer: As in ``Editor``.
        seed: Of cold values; each edit draws its own.
        wrap: As in ``SideMemory``.

    Attributes:
        codebook: Keys, values and radii.

    Raises:
        ValueError: An argument is out of range, or as ``SideMemory``.

    Reference:
        Hartvigsen et al., arXiv 2211.11031, algorithm 1.

    Example:
        >>> import torch
        >>> from memzoo.arch import create_model
        >>> from memzoo.layers.editor import Edit
        >>> model = create_model("transformer_tiny").eval()
        >>> editor = Grace.attach(model, steps=20)
        >>> question, answer = torch.tensor([[5, 6, 7]]), torch.tensor([[-100, -100, 9]])
        >>> report = editor.edit([Edit(question, answer)])
        >>> int(model(question)[0][0, -1].argmax()), len(editor.codebook)
        (9, 1)
    """

    def __init__(
        self,
        host: nn.Module,
        site: FeedForwardSite,
        *,
        radius: float,
        replace: Replace,
        token: Token,
        init: Init,
        steps: int,
        learning_rate: float,
        sticky: bool,
        answer: Answer | None,
        seed: int,
        wrap: bool,
    ) -> None:
        check_number("radius", radius)
        check_choice("replace", replace, get_args(Replace))
        check_choice("token", token, get_args(Token))
        check_choice("init", init, get_args(Init))
        if replace == "prompt" and token == "first":
            raise ValueError("replace='prompt' has no token before token='first'; use replace='last' or 'all'")
        check_positive("steps", steps)
        check_number("learning_rate", learning_rate)
        layer, weight = site.down, site.down_weight  # once wrapped, the site has a wrapper there
        super().__init__(host, {value_name(site): layer}, answer=answer, wrap=wrap)
        self.replace, self.token, self.init = replace, token, init
        self.steps, self.learning_rate, self.sticky, self.seed = steps, learning_rate, sticky, seed
        self.codebook = Codebook(weight.shape[1], weight.shape[0], float(radius), like=weight)
        self.to(weight.device)
        self._layer = [layer]  # not a submodule
        self._chosen: Tensor | None = None  # place of each row's entry in the last call of several tokens, -1 for none
        self._noted: list[tuple[Tensor, Tensor]] | None = None  # while noting: what was asked, what was said to that
        self._learning: tuple[int, Tensor] | None = None  # the place of an entry, and its value, which is being trained

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        *,
        site: str | None = None,
        radius: float = 1.0,
        replace: Replace = "last",
        token: Token = "last",
        init: Init = "cold",
        steps: int = 100,
        learning_rate: float = 1.0,
        sticky: bool = True,
        answer: Answer | None = None,
        seed: int = 0,
        wrap: bool = False,
    ) -> Self:
        """Attach an empty codebook to a model; the arguments are those of the class.

        Args:
            model: The host, which is frozen.
            site: Name of a feed-forward; by default that of layer ``round(0.84 * layers) - 1``, from 0.
            radius: Of new entries.
            replace: Whose output becomes the value.
            token: Which counted token asks.
            init: New values.
            steps: Of Adam, an edit.
            learning_rate: Of Adam.
            sticky: Whether calls of one token keep the entry.
            answer: As in ``Editor``.
            seed: Of cold values.
            wrap: As in ``SideMemory``.

        Raises:
            ValueError: The site is missing or not recognised, or as the class.
        """
        return cls(
            model,
            find_edit_site(model, site),
            radius=radius,
            replace=replace,
            token=token,
            init=init,
            steps=steps,
            learning_rate=learning_rate,
            sticky=sticky,
            answer=answer,
            seed=seed,
            wrap=wrap,
        )._install()

    # Reading

    def beside(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """Return ``y``, with the value of its entry in the rows that have found one."""
        if x.shape[1] == 1 and self.sticky and self._chosen is not None and len(self._chosen) == len(x):
            return self._replaced(y, self._chosen.clone(), None) if self.replace == "all" else y
        counted = self._counts(x)
        counted = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if counted is None else counted
        asking = self._asking(counted)
        place = (torch.arange(len(x), device=x.device), asking.int().argmax(1))
        query = x.detach()[place]
        if self._noted is not None:
            self._noted.append((query, y.detach()[place].to(self.codebook.keys.dtype)))
        if not len(self.codebook):
            self._chosen = None
            return y
        self._chosen = torch.where(asking.any(1), self.codebook.find(query.to(self.codebook.keys.dtype)), -1)
        return self._replaced(y, self._chosen, {"last": asking, "prompt": counted & ~asking, "all": None}[self.replace])

    @contextmanager
    def _counting(self, counted: Tensor | None) -> Iterator[None]:
        """As in ``Editor``; the first call inside asks, whatever was chosen before."""
        self.new_prompt()
        try:
            with super()._counting(counted):
                yield
        finally:
            self.new_prompt()

    def new_prompt(self) -> None:
        """Forget which entries the last call of several tokens has found."""
        self._chosen = None

    def memorize(self, inputs: Tensor, *, mask: Tensor | None = None, run: Run | None = None) -> None:
        """Add an entry for each row with what the layer says for a value: an optimiser may move it.

        Where the token that asked alone gets the value, what the host says to these inputs does not change. Each row is
        an edit, with an answer of its own.

        Args:
            inputs: What the host reads.
            mask: Which tokens count; all by default.
            run: Calls the host; by default ``host(inputs)``.

        Raises:
            ValueError: As in ``SideMemory``, or it was detached.
        """
        self._check_use("memorize")
        with acting(self), self.reading(mask):
            queries, said = self._note(lambda: (run or self.host)(inputs))
        for query, value in zip(queries, said, strict=True):
            self.codebook.enter(query, value, ("memorized", int(self.codebook.next_edit)))
        self.num_edits.fill_(self.codebook.num_edits)

    # Writing

    def edit(self, edits: Sequence[Edit]) -> EditReport:
        """Learn some edits, one after the other; the first row of each.

        Raises:
            ValueError: As ``check_edits``, or the first row of one has no target; nothing that is asked depends on a
                value or it does not stay finite (edits before that one are learnt); or the editor was detached.
        """
        self._check_use("edit")
        check_edits(edits)
        questions = [_question(edit) for edit in edits]
        with acting(self):
            losses = [self._learn(question) for question in questions]
        return EditReport(self.steps * len(losses), sum(losses) / len(losses))

    def delete(self, edit: int) -> None:
        """Forget one edit, by its number: the first after attaching or a ``reset`` has 0, and numbers stay.

        An edit that added an entry takes it along, with what later edits made of it, which are forgotten too; the entry
        that it narrowed gets its radius back. An edit of an entry that was there gives it the value and the radius
        that it had before. What a later edit has set again stays as that set it, until that is deleted too. So all that
        an edit changed is what it was before, to the bit, if no later edit changed the same entry.

        Raises:
            ValueError: There is no such edit, or the editor was detached.
        """
        self._check_use("delete")
        self.codebook.delete(edit)
        self.num_edits.fill_(self.codebook.num_edits)
        self.new_prompt()

    def reset(self) -> None:
        """Forget all edits; the next one has the number 0.

        Raises:
            ValueError: The editor was detached.
        """
        self._check_use("reset")
        self.codebook.clear()
        self.num_edits.zero_()
        self.new_prompt()

    # Files

    def load(self, path: str | os.PathLike[str]) -> None:
        """As in ``SideMemory``; a codebook of any size."""
        self._check_use("load")
        before = self.codebook
        self.codebook = copy.deepcopy(before)
        self.codebook.make_room(file_sizes(path))
        try:
            super().load(path)
        except ValueError:
            self.codebook = before
            raise

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.new_prompt()
        super()._load_from_state_dict(*arguments)

    def _describe(self) -> dict[str, Any]:
        read = {"radius": self.codebook.radius, "replace": self.replace, "token": self.token}
        return {"sites": list(self.sites), **read}

    def _append(self) -> None:
        raise ValueError(
            "merge() of a codebook, which replaces outputs near its keys: no weights do that; leave it beside the host"
        )

    # Parts

    def _asking(self, counted: Tensor) -> Tensor:
        """Return the one token of each row that asks, (rows, time) bool; none where none counts."""
        number = counted.int().cumsum(1)
        return counted & (number == (1 if self.token == "first" else number[:, -1:]))

    def _replaced(self, y: Tensor, chosen: Tensor, tokens: Tensor | None) -> Tensor:
        values = self.codebook.values[chosen.clamp(min=0)]
        if self._learning is not None:
            place, value = self._learning
            values = torch.where((chosen == place)[:, None], value, values)
        hit = (chosen >= 0)[:, None, None]
        return torch.where(hit if tokens is None else hit & tokens[..., None], values[:, None].to(y.dtype), y)

    @torch.no_grad()
    def _note(self, run: Callable[[], object]) -> tuple[Tensor, Tensor]:
        """Return what each row asks with, and what the layer returns there by itself."""
        self._noted = []
        try:
            with self.calling_all():
                run()
            return self._noted[-1]
        finally:
            self._noted = None

    def _learn(self, edit: Edit) -> float:
        """Enter an edit of one row and train its value; return the loss before the last step."""
        run, number = partial(self.answer, edit.inputs, edit.mask, asked=edit.asked), int(self.codebook.next_edit)
        calls = CallReplay(self.host, self._layer[0])
        with calls.record():
            queries, said = self._note(run)
        label = edit.targets[edit.targets != NOT_SCORED].tolist() if edit.label is None else edit.label
        value = said[0] if self.init == "warm" else draw_value(said[0], self.seed + number)
        place = self.codebook.enter(queries[0], value, label)
        try:
            value, loss = self._train(place, lambda: answer_loss(run(), edit.targets), calls)
        except BaseException:
            self.codebook.delete(number)
            self.codebook.next_edit.fill_(number)
            raise
        with torch.no_grad():
            self.codebook.values[place] = value
        self.num_edits.fill_(self.codebook.num_edits)
        return loss

    def _train(self, place: int, loss_of: Callable[[], Tensor], calls: CallReplay) -> tuple[Tensor, float]:
        """Return a value after all steps, and the loss before the last."""
        value = self.codebook.values[place].detach().clone().requires_grad_()
        optimizer, loss = torch.optim.Adam([value], lr=self.learning_rate), value.new_zeros(())
        self._learning = place, value
        try:
            for step in range(self.steps):
                with torch.enable_grad(), calls.replay():
                    loss = loss_of()
                    (value.grad,) = torch.autograd.grad(loss, value)
                if not step and loss and not value.grad.any():
                    raise ValueError(
                        f"no target depends on a value at site {self.sites[0]!r} with token={self.token!r} and "
                        f"replace={self.replace!r}; use replace='all', the token that the host reads, or a lower site"
                    )
                optimizer.step()
        finally:
            self._learning = None
        if not value.isfinite().all():
            raise ValueError(f"the value of an edit is not finite after {self.steps} steps; lower learning_rate")
        return value.detach(), float(loss.detach())


def _question(edit: Edit) -> Edit:
    """Return the first row of an edit."""
    first = Edit(edit.inputs[:1], edit.targets[:1], None if edit.mask is None else edit.mask[:1], label=edit.label)
    if not (first.targets != NOT_SCORED).any():
        raise ValueError("edits: the first row of one has no target; pass what is to be answered to it")
    return first


@register_layer("grace", "side", skips=SKIPS)
def _build(host: nn.Module, *, sites: Sequence[str] | None = None, **options: Any) -> Grace:
    """Attach to the one site that is named."""
    return Grace.attach(host, site=None if sites is None else sites[0], **options)
