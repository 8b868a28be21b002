"""GRACE: which rows and tokens get a value, padded, masked and generated."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.layers.grace_cases import attach, edit_of, site_call
from tests.layers.side_hosts import HOSTS, make_host, make_inputs, read

# Rows, tokens, masks


def test_rows_of_any_padding_get_what_they_get_alone() -> None:
    """Left or right, beside others: the token that asks is the last that counts."""
    host, x = make_host("ours", torch.float64), make_inputs("ours", batch=2)
    grace = attach("ours", host, radius=1e-6)
    grace.edit([edit_of(x[:1], 3), edit_of(x[1:, :4], 9)])
    alone = [grace.answer(x[:1])[:, -1], grace.answer(x[1:, :4])[:, -1]]
    filler = torch.ones(1, 2, dtype=torch.int64)
    right = torch.cat([x[:1], torch.cat([x[1:, :4], filler], 1)])
    left = torch.cat([x[:1], torch.cat([filler, x[1:, :4]], 1)])
    for batch, real, end in ((right, slice(0, 4), 3), (left, slice(2, 6), 5)):
        mask = torch.ones_like(batch, dtype=torch.bool)
        mask[1] = False
        mask[1, real] = True
        logits = grace.answer(batch, mask)
        torch.testing.assert_close(torch.stack([logits[0, -1], logits[1, end]]), torch.cat(alone))
    assert [int(logit.argmax()) for logit in alone] == [3, 9]


def test_a_row_in_which_nothing_counts_is_what_it_was() -> None:
    x = make_inputs("ours")
    grace = attach("ours", replace="all")
    before = read(grace.host, x)
    grace.memorize(x[:1, :1])
    nn.init.constant_(grace.codebook.values, 7.0)
    nothing = torch.zeros_like(x, dtype=torch.bool)
    assert torch.equal(grace.answer(x, asked=nothing), before)


@pytest.mark.parametrize(("replace", "changed"), [("last", [3]), ("prompt", [1, 2]), ("all", [0, 1, 2, 3, 4, 5])])
def test_replace_says_which_tokens_get_the_value(replace: Any, changed: list[int]) -> None:
    x = make_inputs("ours")[:1]
    counted = torch.tensor([[False, True, True, True, False, False]])
    grace = attach("ours", replace=replace)
    with grace.reading(counted):
        grace.memorize(x, mask=counted)
        nn.init.constant_(grace.codebook.values, 7.0)
        said = site_call(grace, x)[1]
    assert (said[0] == 7).all(1).nonzero().flatten().tolist() == changed


def test_tokens_behind_the_question_do_not_ask() -> None:
    x = make_inputs("ours")
    grace = attach("ours")
    grace.edit([edit_of(x[:, :4][:1], 3)])
    with grace.reading(torch.ones(2, 4, dtype=torch.bool)):
        assert int(read(grace.host, x)[0, 3].argmax()) == 3
        with pytest.raises(ValueError, match=r"the tokens that count, \(2, 4\), are not those .* reads, \(2, 3\)"):
            read(grace.host, x[:, :3])


def test_beams_share_the_question_of_their_row() -> None:
    host, x = make_host("llama"), make_inputs("llama")
    grace = attach("llama", host, replace="all", steps=40)
    grace.edit([edit_of(x[:1], 3)])
    asked = torch.ones_like(x, dtype=torch.bool)
    asked[1, :3] = False
    alone = grace.answer(x, asked=asked)
    beams = grace.answer(x.repeat_interleave(3, 0), asked=asked)
    torch.testing.assert_close(beams, alone.repeat_interleave(3, 0))
    assert int(alone[0, -1].argmax()) == 3
    options = {"max_new_tokens": 2, "do_sample": False, "num_beams": 3, "pad_token_id": 0, "eos_token_id": None}
    with grace.reading(asked):
        assert int(host.generate(x, **options)[0, x.shape[1]]) == 3


# Generating


def decode(name: str, host: Any, prompt: Tensor, count: int) -> list[int]:
    """Go on greedily from a prompt, with the host's own cache, a token a call."""
    if name == "ours":
        return torch.stack([*host.generate(prompt, count, temperature=0.0)], 1)[0].tolist()
    output, said = host(prompt, use_cache=True), []
    for _ in range(count):
        said.append(int(output.logits[0, -1].argmax()))
        output = host(torch.tensor([said[-1:]]), past_key_values=output.past_key_values, use_cache=True)
    return said


@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
@pytest.mark.parametrize("name", ["ours", "llama", "gpt2"])
def test_generating_with_a_cache_reads_what_reading_it_all_again_reads(name: str, replace: Any) -> None:
    """And that is what an edit is trained on: the question decides, its answer does not."""
    prompt = make_inputs(name)[:1, :4]
    grace = attach(name, replace=replace, site=HOSTS[name].names[0])
    grace.memorize(prompt)
    nn.init.normal_(grace.codebook.values, std=3.0, generator=torch.Generator().manual_seed(2))
    text, logits = prompt, torch.empty(0)
    for _ in range(4):
        logits = grace.answer(text, asked=torch.ones_like(prompt, dtype=torch.bool))[:, -1]
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
    assert decode(name, grace.host, prompt, 4) == text[0, 4:].tolist()
    with grace.disabled():
        assert (grace.answer(text[:, :-1])[:, -1] - logits).abs().max() > 1e-3


def test_an_answer_of_several_tokens_is_generated() -> None:
    prompt = make_inputs("ours")[:1, :4]
    grace = attach("ours", site="blocks.0.ffn", steps=60, learning_rate=0.3)
    grace.edit([edit_of(prompt, 3, 14)])
    assert decode("ours", grace.host, prompt, 2) == [3, 14]


def test_sticky_rows_keep_what_they_found_until_they_are_asked_again() -> None:
    x = make_inputs("ours")
    grace = attach("ours", replace="all")
    grace.memorize(x[:1])
    nn.init.constant_(grace.codebook.values, 7.0)

    def hit(inputs: Tensor) -> list[bool]:
        return (site_call(grace, inputs)[1] == 7).flatten(1).all(1).tolist()

    assert hit(x) == [True, False]
    assert hit(x[:, :1]) == [True, False]
    assert hit(x[:1, :1]) == [False]  # other rows: these ask themselves
    assert hit(x) == [True, False]
    with grace.reading(None):
        assert hit(x[:, :1]) == [False, False]
    assert hit(x) == [True, False]
    grace.sticky = False
    assert hit(x[:, :1]) == [False, False]
