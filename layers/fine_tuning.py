"""Fine-tuning one matrix of a model on its edits, alone (FT) or held back (FT-L2): what editors are compared with."""

import math
from collections.abc import Sequence
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.call_replay import CallReplay
from memzoo.layers.edit_parts import acting, find_edit_site, value_name
from memzoo.layers.editor import Answer, Edit, Editor, EditReport, answer_loss, check_edits
from memzoo.layers.errors import check_choice, check_number, check_positive
from memzoo.layers.feed_forward_site import FeedForwardSite, matrix_of
from memzoo.layers.registry import register_layer

Optimizer = Literal["adam", "sgd"]


class FineTuning(Editor):
    """One change ``D`` of the matrix that holds a feed-forward's values: ``y = W x + b + D x``, everywhere.

    The baseline of editors that know what they are asked about: each edit goes on training the same ``D``, with nothing
    that keeps other answers, but for a penalty ``l2 * |D|^2`` (FT-L2). ``D`` is kept in at least float32 (float64
    stays) beside the host, whose weights are written by ``merge`` alone; that keeps a copy of the matrix until
    ``unmerge`` puts it back to the bit.

    An edit is learnt in all of its wordings, the mean over the targets of each, and edits that come together as the
    mean over them. Each call of ``edit`` starts a new optimiser.

    Args:
        host: The model.
        site: The feed-forward.
        max_steps: Of the optimiser, a call of ``edit``.
        stop_loss: An edit ends before a step at whose start its loss, without the penalty, is below this.
        learning_rate: Of the optimiser.
        optimizer: "adam" or "sgd", both without decay.
        l2: Of the squares of ``D``, all edits together: how far from the host's matrix.
        answer: As in ``Editor``.
        wrap: As in ``SideMemory``.

    Attributes:
        delta: ``D`` (dim, width).

    Raises:
        ValueError: An argument is out of range, or as ``SideMemory``.

    Reference:
        Zhu et al., arXiv 2012.00363, sections 3 and 4, on one matrix as Meng et al., arXiv 2202.05262, section 3.3.

    Example:
        >>> import torch
        >>> from memzoo.arch import create_model
        >>> from memzoo.layers.editor import Edit
        >>> model = create_model("transformer_tiny").eval()
        >>> editor = FineTuning.attach(model, learning_rate=0.01)
        >>> question, answer = torch.tensor([[5, 6, 7]]), torch.tensor([[-100, -100, 9]])
        >>> report = editor.edit([Edit(question, answer)])
        >>> int(model(question)[0][0, -1].argmax())
        9
    """

    def __init__(
        self,
        host: nn.Module,
        site: FeedForwardSite,
        *,
        max_steps: int,
        stop_loss: float,
        learning_rate: float,
        optimizer: Optimizer,
        l2: float,
        answer: Answer | None,
        wrap: bool,
    ) -> None:
        check_positive("max_steps", max_steps)
        check_number("stop_loss", stop_loss, zero=True)
        check_number("learning_rate", learning_rate)
        check_choice("optimizer", optimizer, get_args(Optimizer))
        check_number("l2", l2, zero=True)
        layer, weight = site.down, site.down_weight  # once wrapped, the site has a wrapper there
        super().__init__(host, {value_name(site): layer}, answer=answer, wrap=wrap)
        self.max_steps, self.stop_loss, self.learning_rate = max_steps, stop_loss, learning_rate
        self.optimizer, self.l2 = optimizer, l2
        self.delta = nn.Parameter(torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)))
        self.to(weight.device)
        self._layer = [layer]  # not a submodule
        self._base: Tensor | None = None  # while merged, the host's matrix as it was

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        *,
        site: str | None = None,
        max_steps: int = 25,
        stop_loss: float = 1e-2,
        learning_rate: float = 5e-4,
        optimizer: Optimizer = "adam",
        l2: float = 0.0,
        answer: Answer | None = None,
        seed: int = 0,
        wrap: bool = False,
    ) -> Self:
        """Attach a change of zero to a model; the arguments are those of the class.

        Args:
            model: The host, which is frozen.
            site: Name of a feed-forward; by default that of layer ``round(0.84 * layers) - 1``, from 0.
            max_steps: Of the optimiser, a call of ``edit``.
            stop_loss: Of the answers alone, below which an edit ends.
            learning_rate: Of the optimiser.
            optimizer: "adam" or "sgd".
            l2: Of the squares of the change.
            answer: As in ``Editor``.
            seed: As all editors have; nothing is drawn.
            wrap: As in ``SideMemory``.

        Raises:
            ValueError: The site is missing or not recognised, or as the class.
        """
        return cls(
            model,
            find_edit_site(model, site),
            max_steps=max_steps,
            stop_loss=stop_loss,
            learning_rate=learning_rate,
            optimizer=optimizer,
            l2=l2,
            answer=answer,
            wrap=wrap,
        )._install()

    def beside(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """Return ``y + D x``."""
        return y + F.linear(x, self.delta.to(x.dtype)).to(y.dtype)

    def edit(self, edits: Sequence[Edit]) -> EditReport:
        """Learn some edits together.

        Raises:
            ValueError: As ``check_edits``; the loss does not stay finite; or the editor is merged or was detached. The
                change is then what it was.
        """
        self._check_use("edit")
        check_edits(edits)
        make: Any = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[self.optimizer]
        optimizer, steps, loss = make([self.delta], lr=self.learning_rate), 0, 0.0
        before = self.delta.detach().clone()
        try:
            with acting(self):
                calls = [self._record(edit) for edit in edits]
                for _ in range(self.max_steps):
                    loss = self._backward(edits, calls)
                    if loss < self.stop_loss:
                        break
                    optimizer.step()
                    steps += 1
            if not self.delta.isfinite().all():
                raise ValueError(f"the change is not finite after {steps} steps; lower learning_rate")
        except BaseException:
            with torch.no_grad():
                self.delta.copy_(before)
            raise
        finally:
            self.delta.grad = None
        self.num_edits += len(edits)
        return EditReport(steps, loss)

    @torch.no_grad()
    def reset(self) -> None:
        """Set the change to zero; it stays the same parameter.

        Raises:
            ValueError: The editor is merged or was detached.
        """
        self._check_use("reset")
        self.delta.zero_()
        self.delta.grad = None
        self.num_edits.zero_()

    def _record(self, edit: Edit) -> CallReplay:
        calls = CallReplay(self.host, self._layer[0])
        with torch.no_grad(), calls.record():
            self.answer(edit.inputs, edit.mask, asked=edit.asked)
        return calls

    def _backward(self, edits: Sequence[Edit], calls: Sequence[CallReplay]) -> float:
        """Put the gradient of the loss and the penalty into ``delta``, and return the loss without the penalty."""
        total = 0.0
        self.delta.grad = 2 * self.l2 * self.delta.detach()
        for edit, call in zip(edits, calls, strict=True):
            with torch.enable_grad(), call.replay():
                loss = answer_loss(self.answer(edit.inputs, edit.mask, asked=edit.asked), edit.targets) / len(edits)
                loss.backward(inputs=[self.delta])
            total += float(loss.detach())
        if not math.isfinite(total):
            raise ValueError(f"the loss of the edits is {total}; lower learning_rate={self.learning_rate}")
        return total

    def _describe(self) -> dict[str, Any]:
        return {"sites": list(self.sites)}

    @torch.no_grad()
    def _append(self) -> None:
        weight = matrix_of(self._layer[0])
        self._base = weight.clone()
        weight.copy_(weight.to(self.delta) + self.delta)

    @torch.no_grad()
    def _remove(self) -> None:
        matrix_of(self._layer[0]).copy_(cast(Tensor, self._base))
        self._base = None


@register_layer("fine_tuning", "side")
def _build(host: nn.Module, *, sites: Sequence[str] | None = None, **options: Any) -> FineTuning:
    """Attach to the one site that is named."""
    return FineTuning.attach(host, site=None if sites is None else sites[0], **options)
