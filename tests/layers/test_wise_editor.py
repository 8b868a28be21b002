"""What WISE has of all editors: masks of hosts of every kind, dtypes, and decisions that end when they should."""

import contextlib

import pytest
import torch
from torch import nn

from memzoo.arch import create_model
from memzoo.layers import Grace, Wise
from memzoo.layers.editor import NOT_SCORED, Edit
from memzoo.layers.wise_routing import MAIN, slack
from tests.layers.side_hosts import VOCAB_SIZE, make_host, make_inputs, read
from tests.layers.wise_cases import EXACT, QUICK, attach, hand_made, make_edit

LOW = pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["ours", "llama", "gpt2", "phi3"])
def test_a_mask_reaches_the_host(name: str, side: str) -> None:
    _, editor, x = attach(name)
    pad = torch.full((2, 3), VOCAB_SIZE - 1)
    padded, mask = torch.cat([pad, x] if side == "left" else [x, pad], 1), torch.ones(2, 9, dtype=torch.bool)
    mask[:, slice(3) if side == "left" else slice(6, 9)] = False
    torch.testing.assert_close(editor.answer(padded, mask)[mask], editor.answer(x).flatten(0, 1), **EXACT)


def test_a_host_that_would_not_hear_of_a_mask_is_refused() -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_host("ours", torch.float64)

        def forward(self, inputs: torch.Tensor, **others: object) -> torch.Tensor:
            return self.inner(inputs)[0]  # type: ignore[no-any-return]

    host, x = Deaf(), make_inputs("ours")
    mask = torch.ones_like(x, dtype=torch.bool)
    editor = Wise.attach(host, **QUICK)
    assert torch.equal(editor.answer(x), host(x))
    with pytest.raises(ValueError, match=r"Deaf.forward\(\) has neither mask nor attention_mask.*answer="):
        editor.answer(x, mask)
    editor.detach()
    told = Wise.attach(host, answer=lambda inputs, mask: host.inner(inputs, mask=mask)[0], **QUICK)
    assert torch.equal(told.answer(x, mask), host(x))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda part: part.to(torch.float16)])
def test_what_is_cast_keeps_at_least_float32(cast) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        kept = torch.promote_types(dtype, torch.float32)
        host, editor, _ = attach(dtype=dtype, threshold_ratio=0.5)
        edit = make_edit(dtype=dtype)
        editor.edit([edit])
        editor.edit([make_edit(1, dtype=dtype)])
        before = {name: tensor.clone() for name, tensor in editor.state_dict().items()}
        whole = nn.ModuleDict({"host": host, "editor": editor})
        cast(whole)
        low = host.embedding.weight.dtype
        assert low in (torch.float16, torch.bfloat16)
        assert all(torch.equal(tensor, before[name]) for name, tensor in editor.state_dict().items())
        assert {p.dtype for p in (*editor.parameters(), editor.threshold, editor.shards.shards)} == {kept}
        editor.edit([edit])  # it goes on
        assert editor.answer(edit.inputs).dtype == low
        assert editor.to("meta").delta.device.type == "meta"


@LOW
def test_no_edit_is_lost_to_rounding_in_a_padded_batch(autocast: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host = create_model("transformer_tiny").eval().to(torch.float32 if autocast else torch.bfloat16)
        questions = torch.randint(5, 250, (12, 7))
        others = torch.randint(5, 250, (15, 7))
    padded = torch.nn.functional.pad(questions, (0, 9))
    mask = (torch.arange(16) < 7).expand(12, 16)
    least = 1.0
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
        for seed, question in enumerate(questions.split(1)):
            editor = Wise.attach(host, max_steps=10, seed=seed)
            editor.edit([Edit(question, torch.tensor([[NOT_SCORED] * 6 + [9]]))])
            for found, row in (
                (editor.routing(question), 0),
                (editor.routing(torch.cat([question, others])), 0),
                (editor.routing(padded, mask, asked=mask), seed),
            ):
                assert int(found.chosen[row]) == 0
                least = min(least, float(found.activations[0, row] / editor.threshold))
            editor.detach()
    assert least < 1 - 1e-6  # some would be, were there no more than that to spare


def test_the_slack_is_that_of_the_dtype() -> None:
    assert slack(torch.float64) == slack(torch.float32) == 1e-6
    assert slack(torch.bfloat16) == 2**-7
    assert slack(torch.float16) == 2**-10


@pytest.mark.parametrize("how", ["setter", "disabled", "enabled inside"])
def test_a_decision_ends_where_the_editor_is_switched(how: str) -> None:
    host, editor, x = attach()
    hand_made(editor, 0.0)
    step, asked = x[:, -1:], x[:, :3]
    with editor.disabled():
        plain = read(host, step)
    read(host, asked)
    editor.threshold.fill_(1e9)  # a new decision is against it
    assert not torch.equal(read(host, step), plain)  # the old one stays
    if how == "setter":
        editor.enabled = False
        editor.enabled = True
    else:
        with editor.disabled():
            read(host, asked)
            if how == "enabled inside":
                editor.enabled = True
                editor.threshold.fill_(0.0)
                read(host, asked)  # decides, and that must not be kept
                editor.threshold.fill_(1e9)
    assert editor.enabled
    assert torch.equal(read(host, step), plain)


def test_what_is_behind_the_question_does_not_count() -> None:
    host, editor, x = attach("llama")
    hand_made(editor, 0.0)
    asked = torch.ones(2, 4, dtype=torch.bool)
    activations = editor.routing(x[:, :4]).activations
    torch.testing.assert_close(editor.routing(x, asked=asked).activations, activations, **EXACT)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with editor.reading(asked):
        cached = host.generate(x[:, :4], **options)
        editor.new_prompt()
        assert torch.equal(host.generate(x[:, :4], use_cache=False, **options), cached)


def test_beams_share_the_question_of_their_row() -> None:
    host, editor, x = attach("llama")
    hand_made(editor, 0.0)
    asked = torch.ones(2, 6, dtype=torch.bool)
    asked[:, :2] = False
    editor.threshold.copy_(editor.routing(x, asked=asked).activations.mean())
    expected = editor.routing(x, asked=asked)
    beams = editor.routing(x.repeat_interleave(3, 0), asked=asked)
    torch.testing.assert_close(beams.activations, expected.activations.repeat_interleave(3, 1), **EXACT)
    assert torch.equal(beams.chosen, expected.chosen.repeat_interleave(3))
    assert {*expected.chosen.tolist()} == {MAIN, 0}
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "pad_token_id": 0, "eos_token_id": None}
    with editor.reading(torch.ones(2, 6, dtype=torch.bool)):
        assert host.generate(x, **options).shape == (2, 9)


@pytest.mark.parametrize("asked_of", ["wise", "grace"])
def test_every_editor_of_a_host_is_told_which_tokens_ask(asked_of: str) -> None:
    """Padding does not ask either, whichever of them is called."""
    host = make_host("ours", torch.float64)
    grace = Grace.attach(host, replace="all", steps=40, radius=1e-6)
    editors = {"grace": grace, "wise": Wise.attach(host, **QUICK)}
    question = make_inputs("ours")[:1, :4]
    grace.edit([Edit(question, torch.tensor([[NOT_SCORED] * 3 + [9]]))])
    alone = grace.answer(question)
    padded, mask = torch.nn.functional.pad(question, (0, 3)), torch.arange(7)[None] < 4
    found = editors[asked_of].answer(padded, mask)[:, :4]
    torch.testing.assert_close(found, alone, **EXACT)
    assert int(found[0, -1].argmax()) == 9
    assert all(editor._counted is None for editor in editors.values())
    editors.pop(asked_of).detach()
    (other,) = editors.values()
    with other.reading(mask):
        assert other._counted is mask
