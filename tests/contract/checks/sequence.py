"""Checks of what a sequence part, a mixer or a model, computes: shapes, causality, streaming, masks, documents."""

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from memzoo.layers.state import State
from memzoo.layers.trace import Trace
from tests.contract.checks.core import (
    BATCH,
    TIME,
    Part,
    check,
    close,
    close_state,
    for_all,
    gradients,
    mixer_states,
    probe,
    random_mask,
    same,
    same_state,
    stream,
)

SEQUENCE = ("mixer", "model")
EVERYWHERE = [*range(1, TIME)]  # one token a call
CUTS = st.sets(st.integers(1, TIME - 1), min_size=1, max_size=5).map(sorted)
DOCUMENTS = torch.tensor(
    [
        [7] + [2] * 8 + [7] * 2 + [9] * 8,  # one token, many, and the first id again
        [5] * TIME,
        [0] * 9 + [3] * 1 + [0] * 9,
    ]
)
HOLES = random_mask(seed=6) | (torch.arange(TIME) == TIME - 1)  # every row keeps its last token


@check(*SEQUENCE)
def any_batch_and_time_will_do(part: Part) -> None:
    """One token, fewer than a chunk or a convolution is wide, and more."""
    module = part.build()
    width = module(part.inputs(1, 1))[0].shape[-1]

    @for_all(12, st.integers(1, 3), st.integers(1, TIME))
    def shapes_hold(batch: int, time: int) -> None:
        x = part.inputs(batch, time)
        y, state = module(x)
        assert y.shape == (batch, time, width)
        assert y.isfinite().all()
        for name, tensor in state.named_tensors().items():
            assert tensor.shape[0] == batch, f"axis 0 of state.{name} is {tensor.shape[0]}, not the batch {batch}"
        for own in mixer_states(state):
            assert (own.position == time).all(), f"position is {own.position.tolist()} after {time} tokens"


@check(*SEQUENCE)
def the_past_is_remembered(part: Part) -> None:
    """Otherwise most of the checks below would hold for a layer that does nothing."""
    module, x = part.build(), part.inputs()
    first = torch.zeros(BATCH, TIME, dtype=torch.bool)
    first[:, 0] = True
    difference = module(part.changed(x, first))[0] - module(x)[0]
    assert (difference[:, 1:].abs().amax((1, 2)) > 1e-6).all(), "the first token changes no later output"
    _, state = module(x)
    assert not torch.equal(module(x, state)[0], module(x)[0]), "a passed state changes nothing"


@check(*SEQUENCE)
def the_future_is_not_seen(part: Part) -> None:
    module, x = part.build(), part.inputs()
    for training in (True, False):
        y, _ = module.train(training)(x)
        for t in (0, 1, 7, TIME - 2):
            future = torch.arange(TIME).expand(BATCH, TIME) > t
            y_other, _ = module(part.changed(x, future))
            part.unmoved(y_other[:, : t + 1], y[:, : t + 1], f"outputs up to {t} after a change behind it, {training=}")


@check(*SEQUENCE)
def rows_do_not_see_each_other(part: Part) -> None:
    module, x = part.build(), part.inputs()
    others = torch.ones(BATCH, TIME, dtype=torch.bool)
    others[1] = False
    for training in (True, False):
        y, state = module.train(training)(x)
        y_other, state_other = module(part.changed(x, others))
        part.unmoved(y_other[1], y[1], f"row 1 after a change of the others, {training=}")
        part.unmoved_state(
            state_other.reorder(torch.tensor([1])), state.reorder(torch.tensor([1])), f"row 1, {training=}"
        )
        y_alone, state_alone = module(x[1:2])
        close(y_alone[0], y[1], f"row 1 alone, {training=}")
        close_state(state_alone, state.reorder(torch.tensor([1])), f"row 1 alone, {training=}")


@check(*SEQUENCE)
def pieces_equal_the_whole(part: Part) -> None:
    module, x = part.build(), part.inputs()
    y, state = module(x)
    with torch.no_grad():
        _streams_equally(module, x, EVERYWHERE, y, state)

        @for_all(_draws(part), CUTS)
        def streams_equally(cuts: list[int]) -> None:
            _streams_equally(module, x, cuts, y, state)


@check(*SEQUENCE)
def pieces_equal_the_whole_with_a_mask(part: Part) -> None:
    module, x, mask = part.build(), part.inputs(), random_mask()
    y, state = module(x, mask=mask)

    def streams_equally(cuts: list[int]) -> None:
        y_pieces, state_pieces = stream(module, x, cuts, mask=mask)
        close(y_pieces[mask], y[mask], f"outputs cut at {cuts}")
        close_state(state_pieces, state, f"cut at {cuts}")

    with torch.no_grad():
        streams_equally(EVERYWHERE)
        for_all(_draws(part), CUTS)(streams_equally)


@check(*SEQUENCE)
def pieces_equal_the_whole_with_documents(part: Part) -> None:
    """Cut anywhere: inside a document, and exactly at its border."""
    module, x = part.build(), part.inputs()
    borders = (DOCUMENTS[0, 1:] != DOCUMENTS[0, :-1]).nonzero().flatten() + 1
    y, state = module(x, doc_ids=DOCUMENTS)
    with torch.no_grad():
        _streams_equally(module, x, borders.tolist(), y, state, doc_ids=DOCUMENTS)

        @for_all(_draws(part), CUTS, st.lists(st.booleans(), min_size=TIME, max_size=TIME))
        def streams_equally(cuts: list[int], starts: list[bool]) -> None:
            random = torch.tensor(starts).cumsum(0) % 3
            doc_ids = torch.stack([random, random.flip(0), DOCUMENTS[2]])
            expected = module(x, doc_ids=doc_ids)
            _streams_equally(module, x, cuts, *expected, doc_ids=doc_ids)


@check(*SEQUENCE)
def gradients_flow_through_the_state(part: Part) -> None:
    """Backpropagation through two calls equals that through one, outputs and final state included."""
    module, x = part.build(), part.inputs()
    whole = gradients(module, _loss(*module(x)))
    for name, gradient in gradients(module, _loss(*stream(module, x, [1, 8]))).items():
        close(gradient, whole[name], f"the gradient of {name} over three calls", tolerance=1e-9)


@check(*SEQUENCE)
def masked_tokens_are_not_there(part: Part) -> None:
    """Leaving the masked tokens out altogether gives the same outputs and state."""
    module, x, mask = part.build(), part.inputs(), random_mask()
    y, state = module(x, mask=mask)
    for row in range(BATCH - 1):
        y_alone, state_alone = module(x[row : row + 1, mask[row]])
        close(y[row, mask[row]], y_alone[0], f"row {row} without its masked tokens")
        close_state(state.reorder(torch.tensor([row])), state_alone, f"row {row} without its masked tokens")
    everything = torch.ones(BATCH, TIME, dtype=torch.bool)
    y_all, state_all = module(x, mask=everything)
    close(y_all, module(x)[0], "outputs under a mask that masks nothing")
    close_state(state_all, module(x)[1], "under a mask that masks nothing")


@check(*SEQUENCE)
def masked_tokens_change_nothing(part: Part) -> None:
    module, x, mask = part.build(), part.inputs(), random_mask()
    _, state = module(part.inputs(time=7))
    for start in (None, state):
        y, end = module(x, start, mask=mask)
        y_other, end_other = module(part.changed(x, ~mask), start, mask=mask)
        part.unmoved(y_other[mask], y[mask], "real outputs after a change of the masked tokens")
        same_state(end_other, end, "after a change of the masked tokens")


@check(*SEQUENCE)
def masked_tokens_are_in_no_loss(part: Part) -> None:
    """Nor in what a layer wants back after the optimiser's step."""
    module, x, mask = part.build(), part.inputs(), random_mask()
    reports = []
    for tokens in (x, part.changed(x, ~mask)):
        trace = Trace(signals=False)
        module(tokens, mask=mask, trace=trace)
        reports.append(trace.losses | trace.statistics)
    for name, value in reports[0].items():
        close(reports[1][name], value, f"{name} after a change of the masked tokens")


@check(*SEQUENCE)
def a_masked_call_leaves_the_state_alone(part: Part) -> None:
    module, x = part.build(), part.inputs()
    nothing = torch.zeros(BATCH, TIME, dtype=torch.bool)
    _, state = module(part.inputs(time=7))
    same_state(module(x, state, mask=nothing)[1], state, "after a call without real tokens")
    same_state(module(x, state, mask=nothing, doc_ids=DOCUMENTS)[1], state, "the same, with documents")
    same_state(module(x, mask=nothing)[1], module.initial_state(BATCH), "a fresh state after such a call")
    last = torch.tensor([BATCH - 1])
    _, mixed = module(x, state, mask=random_mask())
    same_state(mixed.reorder(last), state.reorder(last), "the row without real tokens")


@check(*SEQUENCE)
def packed_documents_equal_separate_ones(part: Part) -> None:
    """Outputs and final states; with holes inside the documents, and after a call that ended in another document."""
    module, x = part.build(), part.inputs()
    with torch.no_grad():  # gradients are below
        _, earlier = module(part.inputs(time=7), doc_ids=torch.full((BATCH, 7), 4))
        for mask in (None, HOLES):
            expected, last = _separate(module, x, mask)
            for start in (None, earlier):
                y, state = module(x, start, doc_ids=DOCUMENTS, mask=mask)
                real = torch.ones_like(HOLES) if mask is None else mask
                close(y[real], expected[real], f"packed outputs, mask={mask is not None}, state={start is not None}")
                for row, state_alone in enumerate(last):
                    close_state(state.reorder(torch.tensor([row])), state_alone, f"row {row}", ignore="document")
                for own in mixer_states(state):
                    same(own.document, DOCUMENTS[:, -1], "state.document")


@check(*SEQUENCE)
def packed_gradients_equal_separate_ones(part: Part) -> None:
    module, x = part.build(), part.inputs()
    for mask in (None, HOLES):
        y, _ = module(x, doc_ids=DOCUMENTS, mask=mask)
        masked = torch.zeros_like(HOLES) if mask is None else ~mask
        separate = gradients(module, probe(_separate(module, x, mask)[0]))
        for name, gradient in gradients(module, probe(y.masked_fill(masked[..., None], 0))).items():
            close(gradient, separate[name], f"the packed gradient of {name}, mask={mask is not None}", tolerance=1e-9)


@check(*SEQUENCE)
def documents_do_not_see_each_other(part: Part) -> None:
    module, x = part.build(), part.inputs()
    _, state = module(x, doc_ids=DOCUMENTS)
    y, end = module(x, state, doc_ids=DOCUMENTS)
    others = DOCUMENTS != 9  # row 0 ends with document 9, alone in its row
    y_other, end_other = module(part.changed(x, others), state, doc_ids=DOCUMENTS)
    part.unmoved(y_other[~others], y[~others], "a document after a change of the others")
    same_state(end_other.reorder(torch.tensor([0])), end.reorder(torch.tensor([0])), "row 0")


def _draws(part: Part) -> int:
    """Of a model's cuts, fewer: its mixers are cut by themselves."""
    return 4 if part.kind == "model" else 6


def _streams_equally(module: nn.Module, x: Tensor, cuts: list[int], y: Tensor, state: State, **grids: Tensor) -> None:
    y_pieces, state_pieces = stream(module, x, cuts, **grids)
    close(y_pieces, y, f"outputs cut at {cuts}")
    close_state(state_pieces, state, f"cut at {cuts}")


def _loss(y: Tensor, state: State) -> Tensor:
    parts = [y[:, -3:], *(t for t in state.named_tensors().values() if t.is_floating_point())]
    return sum((probe(tensor) for tensor in parts), torch.zeros((), dtype=torch.float64))


def _separate(module: nn.Module, x: Tensor, mask: Tensor | None) -> tuple[Tensor, list[State]]:
    """Run every document of ``DOCUMENTS`` in a call of its own: outputs put back, and each row's last state."""
    y = torch.zeros((), dtype=torch.float64)
    last = []
    for row in range(BATCH):
        for inside in _runs(DOCUMENTS[row], torch.ones(TIME, dtype=torch.bool) if mask is None else mask[row]):
            y_alone, state = module(x[row : row + 1, inside])
            y = y if y.dim() else y.new_zeros(BATCH, TIME, y_alone.shape[-1])
            y = y.index_put((torch.tensor(row), inside), y_alone[0])
        last.append(state)
    return y, last


def _runs(ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The real positions of every document of one row: a document is a run of equal ids among the real tokens."""
    real = mask.nonzero().flatten()
    borders = (ids[real][1:] != ids[real][:-1]).nonzero().flatten() + 1
    return [*torch.tensor_split(real, borders)]
