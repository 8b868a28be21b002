"""What editing metrics count, on answers that are known."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memzoo.arch.hugging_face import HuggingFaceLM
from memzoo.layers.editor import Edit, Editor
from memzoo.layers.wise import Wise
from memzoo.lit_modules.editing_metrics import (
    asked_tokens,
    generate_answers,
    mean,
    memory_bytes,
    read_answers,
    read_routing,
)
from tests.layers.side_hosts import make_host
from tests.layers.wise_cases import hand_made
from tests.lit_modules.editing_cases import Dense, Facts, host, padded


def matches(editor: Editor, model: nn.Module, batches: Any, **options: Any) -> Tensor:
    index = torch.arange(8)
    answers = generate_answers(editor, model, [{"index": index, **batch} for batch in batches], **options)
    return answers.matches(answers.expected)


class Successor(nn.Module):
    """Answers every token with the one after it."""

    vocab_size = 23

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return nn.functional.one_hot((tokens + 1) % self.vocab_size, self.vocab_size).float()

    def prefill(self, tokens: Tensor, state=None, *, mask=None, donate=False):
        assert mask is None or mask[:, -1].all()  # prompts end in the last place
        return self(tokens[:, -1]), None

    def step(self, token: Tensor, state=None, *, donate=False):
        return self(token), None


QUESTIONS = [  # the question ends with 3, 9 and 5
    padded([([1, 3], [4, 5]), ([2, 8, 9], [10])]) | {"index": torch.tensor([4, 2])},
    padded([([5], [6, 8, 9])]) | {"index": torch.tensor([2])},
]


def successor() -> Editor:
    return Editor(Successor(), {})


def test_answers_are_those_behind_the_tokens_that_the_data_have():
    answers = read_answers(successor(), QUESTIONS)
    assert answers.said.tolist() == [4, 5, 10, 6, 7, 9]
    assert answers.expected.tolist() == [4, 5, 10, 6, 8, 9]
    assert answers.lengths.tolist() == [2, 1, 3]
    assert answers.index.tolist() == [4, 2, 2]
    assert answers.shares(answers.expected).tolist() == pytest.approx([1, 1, 2 / 3])


def test_the_tokens_of_questions_alone_decide_and_padding_is_masked():
    batch, seen = QUESTIONS[0], []

    def answer(inputs: Tensor, mask: Tensor) -> Tensor:
        seen.append((editor._counted.tolist(), mask.tolist()))
        return editor.host(inputs)

    editor = Editor(Successor(), {}, answer=answer)
    read_answers(editor, [batch])
    assert seen == [([[True, True, False], [True, True, True]], batch["mask"].tolist())]
    prefill, counted = editor.host.prefill, []
    editor.host.prefill = lambda *args, **options: counted.append(editor._counted) or prefill(*args, **options)
    matches(editor, editor.host, [batch])
    assert [mask.tolist() for mask in counted] == [[[False, True, True], [True, True, True]]]


def test_answers_of_some_edits_keep_their_order():
    answers = read_answers(successor(), QUESTIONS).of([2])
    assert answers.said.tolist() == [10, 6, 7, 9]
    assert answers.lengths.tolist() == [1, 3]
    assert len(read_answers(successor(), []).shares(torch.zeros(0))) == 0


def test_classes_are_answers_of_one_token():
    batches = [{"inputs": torch.tensor([3, 4]), "targets": torch.tensor([4, 9]), "index": torch.tensor([0, 1])}]
    answers = read_answers(successor(), batches)
    assert answers.shares(answers.expected).tolist() == [1, 0]
    assert asked_tokens(batches[0]) is None


def test_generation_goes_on_from_its_own_tokens():
    # The last question goes 6, 7, 8 by itself where 6, 8, 9 is asked for; its first token alone is right.
    editor = successor()
    assert matches(editor, editor.host, QUESTIONS).tolist() == [1, 1, 0]
    assert matches(editor, editor.host, QUESTIONS, max_new_tokens=1).tolist() == [1, 1, 1]
    answers = generate_answers(editor, editor.host, QUESTIONS, max_new_tokens=2)
    assert answers.said.tolist() == [4, 5, 10, 6, 7]
    assert answers.expected.tolist() == [4, 5, 10, 6, 8]
    assert (answers.lengths.tolist(), answers.index.tolist()) == ([2, 1, 2], [4, 2, 2])


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_15_generation_from_padded_prompts_is_that_from_each_alone(kind):
    model = host() if kind == "ours" else HuggingFaceLM.of(make_host("llama", torch.float64))
    rows = [([3, 1, 4], [1, 5]), ([9, 2, 6, 5, 3], [5]), ([7], [1, 1])]
    said = []
    for prompt, answer in rows:
        tokens = model.generate(torch.tensor([prompt]), len(answer), temperature=0)
        said.append((prompt, torch.cat(list(tokens)).tolist()))
    editor = Editor(model, {})
    assert matches(editor, model, [padded(said)]).tolist() == [1, 1, 1]
    wrong = [(prompt, [(token + 1) % 23 for token in answer]) for prompt, answer in said]
    assert matches(editor, model, [padded(wrong)]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_15_padding_on_either_side_gives_the_answers_of_each_question_alone(side):
    data, editor = Facts(4), Dense(host())
    nn.init.normal_(editor.weight, generator=torch.Generator().manual_seed(0))
    alone = read_answers(editor, [next(data.questions([number], "edit")) for number in range(4)])
    batch = next(Facts(4, questions_per_batch=4).questions(range(4), "edit"))
    if side == "left":
        shifts = (~batch["mask"]).sum(1).tolist()
        for name in ("inputs", "targets", "mask"):
            batch[name] = torch.stack([row.roll(by) for row, by in zip(batch[name], shifts, strict=True)])
    assert read_answers(editor, [batch]).said.tolist() == alone.said.tolist()


def test_memory_is_what_the_editor_keeps_and_a_mean_of_nothing_is_nan():
    editor = Dense(host())
    assert memory_bytes(editor) == 16 * 16 * 8 + 8
    assert mean(torch.tensor([0.5, 1.0])) == 0.75
    assert mean(torch.zeros(0)) != mean(torch.zeros(0))


@pytest.mark.parametrize("options", [{}, {"sticky": False}, {"granularity": "token"}], ids=["sticky", "free", "token"])
def test_generation_goes_through_the_router(options):
    def adam(parameters):
        return torch.optim.Adam(parameters, 0.3)

    shares = {"mask_ratio": 1.0, "density": 1.0, "norm_constraint": None}
    editor = Wise.attach(host(), max_steps=60, optimizer=adam, **shares, **options)
    batch = padded([([3, 1, 4], [5, 6])])
    before = matches(editor, editor.host, [batch])
    editor.edit([Edit(batch["inputs"], batch["targets"], batch["mask"])])
    assert (before.item(), matches(editor, editor.host, [batch]).item()) == (0, 1)
    with editor.disabled():
        assert matches(editor, editor.host, [batch]).item() == 0


def test_routing_is_response_over_threshold_and_nothing_without_edits():
    data = Facts(2, longest=1)
    editor = Wise.attach(host(), max_steps=3)
    assert read_routing(editor, data.questions([0, 1], "edit")).tolist() == [0, 0]
    (batch,) = data.questions([0], "edit")
    editor.edit([Edit(batch["inputs"], batch["targets"], batch["mask"])])
    edited, other = read_routing(editor, data.questions([0, 1], "edit")).tolist()
    routing = [editor.routing(b["inputs"], b["mask"]) for b in (data.rows_alone(0), data.rows_alone(1))]
    assert [edited, other] == pytest.approx([float(r.activations[0, 0] / r.thresholds[0]) for r in routing])
    assert edited > 1


def test_routing_is_of_the_memory_that_responds_most_over_its_own_threshold():
    """Another that is above its own, but responds less, is not read: what is drawn above 1 is what is routed."""
    editor = Wise.attach(host(), mode="retrieve")
    data, kinds = Facts(4, questions_per_batch=4), ("edit", "paraphrase", "locality")
    hand_made(editor, 0.0, 0.0)
    batches = [batch for kind in kinds for batch in data.questions(range(4), kind)]

    def routings():
        return [editor.routing(b["inputs"], b["mask"], asked=asked_tokens(b)) for b in batches]

    responses = torch.cat([routing.activations for routing in routings()], 1)
    limit = responses.amax(0).median()
    editor.shards.memory_threshold.fill_(2 * limit)
    editor.threshold.copy_(responses[1].min() / 2)
    chosen = torch.cat([routing.chosen for routing in routings()])
    assert {*chosen.tolist()} == {-1, 1}
    assert ((read_routing(editor, batches) > 1) == (chosen >= 0)).all()
