"""GRACE: the checks of its specification, and that edits are aligned, forgotten, saved and generated as it says."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memzoo.arch import create_model
from memzoo.layers import Grace, layer_entry
from memzoo.layers.codebook import Codebook
from memzoo.layers.editor import NOT_SCORED, Edit
from memzoo.layers.reference import grace as reference
from tests.layers.side_hosts import HOSTS, make_host, make_inputs, read

BOTH = pytest.mark.parametrize("wrap", [False, True], ids=["hooks", "wrappers"])
EVERYWHERE = pytest.mark.parametrize("name", HOSTS)


def attach(name: str, host: nn.Module | None = None, **options: Any) -> Grace:
    """A codebook beside a host of any kind; of an image its class token asks."""
    options = {"steps": 8, "token": "first" if HOSTS[name].images else "last", "radius": 1e-3} | options
    return Grace.attach(make_host(name) if host is None else host, **options)


def edit_of(inputs: Tensor, *answer: int, label: Any = None) -> Edit:
    """What is to be answered to one question: tokens behind it, or the class of an image."""
    if inputs.is_floating_point():
        return Edit(inputs, torch.tensor(answer), label=label)
    told = torch.tensor([answer[:-1]], dtype=torch.int64)
    targets = torch.cat([torch.full_like(inputs, NOT_SCORED), told], 1)
    targets[0, inputs.shape[1] - 1 :] = torch.tensor(answer)
    return Edit(torch.cat([inputs, told], 1), targets, label=label)


def site_call(grace: Grace, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer beside which the codebook is reads and returns, the codebook included."""
    seen: list[tuple[Tensor, Tensor]] = []
    layer = grace.host.get_submodule(grace.sites[0])
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    read(grace.host, inputs)
    handle.remove()
    return seen[0]


def tables(grace: Grace) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in grace.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor], *but: str) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one if name not in but)


LATER = ("codebook.next_edit",)  # what deletion does not bring back: numbers are given once


# The numbered checks


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_01_an_empty_codebook_changes_nothing(name: str, dtype: torch.dtype) -> None:
    host, x = make_host(name, dtype), make_inputs(name, dtype=dtype)
    before = read(host, x)
    grace = attach(name, host)
    assert torch.equal(read(host, x), before)
    assert not len(grace.codebook)
    assert grace.codebook.keys.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in host.parameters())


@EVERYWHERE
def test_02_what_is_outside_of_all_radii_is_what_it_was(name: str) -> None:
    host, x = make_host(name), make_inputs(name, batch=3)
    before = read(host, x)
    grace = attach(name, host)
    grace.edit([edit_of(x[1:2], 3)])
    after = read(host, x)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.equal(after[1], before[1])


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_03_a_question_gets_its_value_at_the_token_that_asks_alone(name: str, dtype: torch.dtype) -> None:
    host, x = make_host(name, dtype), make_inputs(name, dtype=dtype)[:1]
    grace = attach(name, host, radius=1.0)
    before = site_call(grace, x)[1]
    report = grace.edit([edit_of(x, 3)])
    key, after = site_call(grace, x)
    token = 0 if HOSTS[name].images else -1
    assert torch.equal(after[0, token], grace.codebook.values[0].to(dtype))
    assert torch.equal(grace.codebook.keys[0], key[0, token].float())
    others = torch.arange(after.shape[1]) != token % after.shape[1]
    assert torch.equal(after[:, others], before[:, others])
    assert report.steps == 8
    assert int(read(host, x).flatten(0, -2)[-1].argmax()) == 3


def test_04_a_conflict_splits_the_space_between_the_two() -> None:
    book = Codebook(2, 1, 5.0, like=torch.zeros(1, dtype=torch.float64))
    for key, label in (([0.0, 0.0], "a"), ([3.0, 4.0], "b")):
        book.enter(torch.tensor(key, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), label)
    assert book.radii.tolist() == [2.5 - 1e-5, 2.5]
    assert float(book.radii.sum()) == pytest.approx(5.0 - 1e-5, abs=1e-12)
    queries = torch.tensor([[0.0, 0.0], [1.5, 2.0], [1.4, 1.9], [3.0, 4.0], [6.0, 8.0]], dtype=torch.float64)
    assert book.find(queries).tolist() == [0, 1, 0, 1, -1]  # the border belongs to the new one


def test_04_another_answer_at_the_very_same_place_is_the_one_that_is_read() -> None:
    book = Codebook(2, 1, 1.0, like=torch.zeros(1))
    places = [book.enter(torch.ones(2), torch.tensor([float(n)]), label) for n, label in enumerate("aba")]
    assert places == [0, 0, 0]
    assert book.find(torch.tensor([[1.0, 1.0], [1.0, 1.5], [1.0, 2.5]])).tolist() == [0, 0, -1]
    assert (book.values.tolist(), book.num_edits) == ([[2.0]], 3)
    for number, value in ((1, 2.0), (2, 0.0)):
        book.delete(number)
        assert book.values.tolist() == [[value]]
    assert book.enter(torch.ones(2), torch.ones(1), "a") == 0
    assert book.values.tolist() == [[0.0]]  # the first answer again, so its value is trained on


def test_04_labels_go_with_values_when_an_edit_between_is_deleted() -> None:
    """Number 1 relabels an entry, number 2 trains that answer on: without number 1 it still gives that answer."""
    book = Codebook(2, 1, 1.0, like=torch.zeros(1))
    for number, label in enumerate("abb"):
        place = book.enter(torch.ones(2), torch.tensor([float(number)]), label)
        with torch.no_grad():
            book.values[place] = number
    book.delete(1)
    assert (book.values.tolist(), torch.equal(book.labels[0], book._code("b"))) == ([[2.0]], True)
    book.delete(2)
    assert (book.values.tolist(), torch.equal(book.labels[0], book._code("a"))) == ([[0.0]], True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_04_questions_edited_again_are_answered_anew_in_any_batch(dtype: torch.dtype) -> None:
    """Alone, beside others and padded, where each computes the same key otherwise."""
    torch.manual_seed(0)
    host = create_model("transformer_tiny").eval().to(dtype)
    grace = Grace.attach(host, replace="all", steps=30, radius=1e-3 if dtype == torch.float32 else 1e-2)
    questions = torch.randint(5, 250, (16, 7))
    padded = torch.cat([questions, torch.zeros(16, 9, dtype=torch.long)], 1)
    mask = (torch.arange(16) < 7).expand(16, 16)
    for answer in (9, 10):
        grace.edit([edit_of(question[None], answer) for question in questions])
        alone = [int(grace.answer(question[None])[0, -1].argmax()) for question in questions]
        assert alone == [answer] * 16
        assert grace.answer(questions)[:, -1].argmax(1).tolist() == alone
        assert grace.answer(padded, mask)[:, 6].argmax(1).tolist() == alone
    assert (len(grace.codebook), int(grace.num_edits)) == (16, 32)
    for number in range(16, 32):
        grace.delete(number)
    assert grace.answer(padded, mask)[:, 6].argmax(1).tolist() == [9] * 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_of_the_dtype_that_a_query_was_computed_in(dtype: torch.dtype) -> None:
    book, query = Codebook(16, 1, 1e-12, like=torch.zeros(1, dtype=torch.float64)), torch.full((16,), 3.0)
    book.enter(query.to(dtype), torch.zeros(1), "a")
    assert float(book.radii) == pytest.approx(3 * 4 * 4 * torch.finfo(dtype).eps)  # |q|, and log2(16)


def test_05_there_are_as_many_entries_as_edits_that_added_one() -> None:
    book = Codebook(1, 1, 1.0, like=torch.zeros(1))
    queries = [0.0, 1.5, 10.0, 10.5, 10.25, 30.0]
    labels = ["a", "a", "b", "c", "c", "a"]
    places = [book.enter(torch.tensor([q]), torch.zeros(1), label) for q, label in zip(queries, labels, strict=True)]
    assert places == [0, 0, 1, 2, 2, 3]  # 1.5 <= 1 + 1 widens the first; 10.25 lies at the border of 10.5
    assert book.edits.tolist() == [0, 2, 3, 5]
    assert book.radii.tolist() == pytest.approx([1.5, 0.25 - 1e-5, 0.25, 1.0], abs=2e-6)
    assert (book.num_edits, len(book)) == (6, 4)


def test_05_keys_and_answers_stay_aligned() -> None:
    """Each of several questions gets its own answer, after the last edit and not just behind its own."""
    x = make_inputs("ours", batch=5)
    grace = attach("ours", steps=40)
    answers = [3, 8, 13, 3, 21]
    for row, answer in zip(x, answers, strict=True):
        grace.edit([edit_of(row[None], answer)])
    assert read(grace.host, x)[:, -1].argmax(1).tolist() == answers
    assert (int(grace.num_edits), len(grace.codebook)) == (5, 5)
    codes = grace.codebook.labels
    assert [bool(torch.equal(code, codes[0])) for code in codes] == [True, False, False, True, False]


@pytest.mark.parametrize("radius", [1e-3, 1e3], ids=["apart", "conflict"])
@pytest.mark.parametrize("name", ["ours", "llama", "gpt2", "vit"])
def test_06_a_deleted_edit_leaves_the_outputs_from_before(name: str, radius: float) -> None:
    x = make_inputs(name, batch=3)
    grace = attach(name, radius=radius, steps=2)
    grace.edit([edit_of(x[:1], 3)])
    before, said = tables(grace), read(grace.host, x)
    grace.edit([edit_of(x[1:2], 4)])
    assert not torch.equal(read(grace.host, x), said)
    grace.delete(1)
    assert torch.equal(read(grace.host, x), said)
    assert same(tables(grace), before, *LATER)
    grace.delete(0)
    assert int(grace.num_edits) == 0
    with pytest.raises(ValueError, match="edit=0 is not in the codebook, which has had 2"):
        grace.delete(0)


# The equations


def test_the_codebook_is_that_of_the_equations() -> None:
    generator = torch.Generator().manual_seed(0)
    book, entries = Codebook(2, 1, 0.6, like=torch.zeros(1, dtype=torch.float64)), []
    for number in range(60):
        query, value = 3 * torch.rand(2, generator=generator, dtype=torch.float64), torch.tensor([float(number)])
        label = int(torch.randint(3, (), generator=generator))
        entries, expected = reference.write(query, value.double(), label, entries, 0.6)
        assert book.enter(query, value.double(), label) == expected
    assert book.radii.tolist() == pytest.approx([entry.radius for entry in entries], abs=1e-12)
    assert 5 < len(book) < 55
    queries = 4 * torch.rand(200, 2, generator=generator, dtype=torch.float64)
    found = [reference.look_up(query, entries) for query in queries]
    assert book.find(queries).tolist() == [-1 if place is None else place for place in found]
    assert None in found


@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
def test_reading_is_that_of_the_equations(replace: Any) -> None:
    grace = attach("ours", make_host("ours", torch.float64), replace=replace, radius=2.0)
    book, x = grace.codebook, torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(0)).double()
    entries: list[reference.Entry] = []
    positions = [4, 2, 3, 0]
    for number, row in enumerate((0, 2, 3)):
        query, value = x[row, positions[row]], torch.full((16,), float(number)).double()
        entries, _ = reference.write(query, value, number, entries, 2.0)
        book.enter(query, value, number)
    y = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1)).double()
    with grace.reading(torch.arange(5) <= torch.tensor(positions)[:, None]):
        assert torch.equal(grace.beside(0, x, y), reference.read(x, y, positions, entries, replace))


# Deletion, entry by entry


def entered(*edits: tuple[float, str], without: int | None = None) -> Codebook:
    """A codebook of one axis whose edit number n sets the value n."""
    book = Codebook(1, 1, 1.0, like=torch.zeros(1, dtype=torch.float64))
    for number, (query, label) in enumerate(edits):
        if number == without:
            book.next_edit += 1
            continue
        place = book.enter(book.keys.new_tensor([query]), book.keys.new_zeros(1), label)
        with torch.no_grad():
            book.values[place] = number
    return book


EDITS = (0.0, "a"), (1.5, "a"), (-1.2, "a"), (5.0, "b"), (6.0, "c"), (20.0, "d")


@pytest.mark.parametrize("number", [1, 2, 4, 5], ids=["widened", "last_value", "split", "alone"])
def test_deleting_an_edit_is_as_if_it_had_never_been(number: int) -> None:
    book, never = entered(*EDITS), entered(*EDITS, without=number)
    book.delete(number)
    assert book.num_edits == len(EDITS) - 1
    if number == 1:  # edit 2 found the radius of edit 1 and widened it no more, without it it would have
        never.radii[0] = 1.0
    for name in ("keys", "values", "radii", "labels", "edits"):
        assert torch.equal(getattr(book, name), getattr(never, name)), name


def test_edits_deleted_in_any_order_leave_nothing() -> None:
    for order in ([0, 3, 4, 5], [2, 1, 0, 5, 4, 3], [1, 2, 0, 3, 5, 4], [5, 4, 3, 2, 1, 0]):
        book = entered(*EDITS)
        for number in order:
            book.delete(number)
        assert book.num_edits == 0
        sizes = {name: len(table) for name, table in book.state_dict().items() if table.dim()}
        assert set(sizes.values()) == {0}


def test_what_a_later_edit_set_again_stays_until_that_is_deleted() -> None:
    book = entered((0.0, "a"), (1.0, "b"), (0.4, "a"))
    assert (book.radii[0], book.values[0].item()) == (0.5 - 1e-5, 2)
    book.delete(1)  # narrowed the first
    assert (book.radii.tolist(), book.values[0].item()) == ([1.0], 2)
    book = entered((0.0, "a"), (0.1, "a"), (0.2, "a"))
    book.delete(1)
    assert book.values[0].item() == 2
    book.delete(2)
    assert book.values[0].item() == 0


def test_an_entry_goes_with_the_edits_that_used_it() -> None:
    book = entered(*EDITS)
    book.delete(0)
    assert (book.num_edits, book.edits.tolist()) == (3, [3, 4, 5])


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
        with pytest.raises(ValueError, match=r"counted has shape \(2, 4\), and site .* reads 2 rows of 3 tokens"):
            read(grace.host, x[:, :3])


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


# Editing


@BOTH
@pytest.mark.parametrize("name", ["ours", "gpt2", "vit"])
def test_calls_that_are_replayed_train_what_whole_calls_train(name: str, wrap: bool) -> None:
    x = make_inputs(name)[:1]
    grace = attach(name, wrap=wrap, init="warm", steps=6, learning_rate=0.1)
    warm = site_call(grace, x)[1][0, 0 if HOSTS[name].images else -1].detach()
    grace.edit([edit_of(x, 3)])
    other = attach(name, wrap=wrap)
    other.memorize(x)
    value = other.codebook.values
    assert torch.equal(value[0], warm)
    optimizer = torch.optim.Adam([value], lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        logits = read(other.host, x).flatten(0, -2)[-1:]
        nn.functional.cross_entropy(logits, torch.tensor([3])).backward()
        optimizer.step()
    torch.testing.assert_close(grace.codebook.values, value, rtol=0, atol=2e-5)


def test_an_edit_trains_its_own_value_alone_and_leaves_no_trace_in_the_host() -> None:
    host, x = make_host("llama"), make_inputs("llama", batch=3)
    base = copy.deepcopy(host.state_dict())
    grace = attach("llama", host)
    grace.edit([edit_of(x[:1], 3)])
    first = grace.codebook.values.detach().clone()
    with torch.no_grad(), grace.disabled():
        grace.edit([edit_of(x[1:2], 4)])
        assert not grace.enabled
    assert torch.equal(grace.codebook.values[:1], first)
    assert len(grace.codebook) == 2
    assert same(base, host.state_dict())
    assert all(parameter.grad is None for parameter in [*host.parameters(), *grace.parameters()])


def test_cold_values_are_uniform_and_of_the_seed_and_the_edit() -> None:
    x = make_inputs("ours")

    def drawn(seed: int) -> Tensor:
        grace = attach("ours", steps=1, learning_rate=1e-9, seed=seed)
        grace.edit([edit_of(row[None], 3) for row in x])
        return grace.codebook.values.detach()

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(7))
    assert not torch.equal(*drawn(0))
    assert 0 <= drawn(0).min() < 0.3 < 0.7 < drawn(0).max() <= 1


def test_an_edit_that_fails_is_not_in_the_codebook() -> None:
    host, x, factor = make_host("ours"), make_inputs("ours"), [1.0]
    grace = attach("ours", host, answer=lambda inputs, mask: read(host, inputs) * factor[0])
    grace.edit([edit_of(x[:1], 3)])
    before = tables(grace)
    with pytest.raises(ValueError, match="targets hold 1000"):
        grace.edit([edit_of(x[:1], 1000)])
    assert same(tables(grace), before)
    factor[0] = torch.nan
    with pytest.raises(ValueError, match="not finite after 8 steps; lower learning_rate"):
        grace.edit([edit_of(x[:1], 3)])  # of the entry that is there
    assert same(tables(grace), before)


@pytest.mark.parametrize("name", ["ours", "vit"])
def test_a_value_that_no_target_depends_on_is_refused(name: str) -> None:
    """In the last layer only the token that is read says anything: of an image the first, of a text its own last."""
    x, token = make_inputs(name)[:1], "last" if name == "vit" else "first"
    grace = attach(name, token=token)
    before = tables(grace)
    with pytest.raises(ValueError, match=f"no target depends .* '{grace.sites[0]}' with token='{token}' and replace="):
        grace.edit([edit_of(x, 3)])
    assert same(tables(grace), before)
    attach(name, token=token, replace="all").edit([edit_of(x, 3)])


def test_loading_a_state_and_disabling_forget_what_was_found() -> None:
    x = make_inputs("ours")[:1]
    grace = attach("ours", replace="all")
    empty = tables(grace)
    grace.edit([edit_of(x, 3)])
    read(grace.host, x)
    grace.load_state_dict(empty)
    with grace.disabled():
        plain = read(grace.host, x[:, :1])
    assert torch.equal(read(grace.host, x[:, :1]), plain)
    grace.edit([edit_of(x, 3)])
    read(grace.host, x)
    with grace.disabled():
        read(grace.host, x.flip(1))
    assert torch.equal(read(grace.host, x[:, :1]), plain)


def test_what_is_no_edit_is_refused() -> None:
    x = make_inputs("ours")[:1]
    grace = attach("ours")
    nothing = torch.full_like(x, NOT_SCORED)
    for edits, message in (
        ([], r"edits=\[\] has nothing to learn"),
        ([Edit(x, nothing)], "has no target"),
        ([Edit(x, x, torch.zeros_like(x, dtype=torch.bool))], "without a real token up to its first target"),
    ):
        with pytest.raises(ValueError, match=message):
            grace.edit(edits)
    for option, value in (
        ("radius", 0.0),
        ("replace", "some"),
        ("token", "any"),
        ("init", "hot"),
        ("steps", 0),
        ("learning_rate", -1.0),
    ):
        with pytest.raises(ValueError, match=f"{option}={value!r}"):
            attach("ours", **{option: value})
    with pytest.raises(ValueError, match="replace='prompt' has no token before token='first'"):
        attach("vit", replace="prompt")
    with pytest.raises(ValueError, match=r"merge\(\) of a codebook, which replaces outputs near its keys"):
        grace.merge()
    grace.detach()
    for call in (grace.reset, lambda: grace.edit([]), lambda: grace.delete(0), lambda: grace.memorize(x)):
        with pytest.raises(ValueError, match="detached"):
            call()


def test_it_stands_five_sixths_up_or_where_it_is_told() -> None:
    assert attach("llama").sites == ("model.layers.1.mlp.down_proj",)
    assert attach("gpt2", site="transformer.h.0.mlp").sites == ("transformer.h.0.mlp.c_proj",)
    deep = nn.Sequential(*(layer_host() for _ in range(32)))
    assert Grace.attach(deep).sites == ("26.down",)
    grace = layer_entry("grace").build(layer_host(), radius=2.0)
    assert (grace.sites, type(grace), grace.codebook.radius) == (("down",), Grace, 2.0)


def layer_host() -> nn.Module:
    from memzoo.layers import SwiGLU

    return SwiGLU(4, hidden_dim=6)


# Files


def test_a_stream_goes_on_from_a_file_to_the_bit(tmp_path: Path) -> None:
    """From a file of its own, and from a state_dict, with entries that conflict, widen and repeat."""
    x = make_inputs("ours", batch=6)
    answers = [3, 3, 8, 8, 3, 13]
    edits = [edit_of(row[None], answer) for row, answer in zip(x, answers, strict=True)]
    whole = attach("ours", radius=3.0)
    whole.edit(edits)
    first = attach("ours", radius=3.0)
    first.edit(edits[:4])
    first.delete(1)
    first.save(tmp_path / "codebook")
    loaded, resumed = attach("ours", radius=3.0), attach("ours", radius=3.0)
    loaded.edit(edits[4:])  # what it knew is replaced
    loaded.load(tmp_path / "codebook")
    resumed.load_state_dict(first.state_dict())
    for grace in (first, loaded, resumed):
        grace.edit(edits[4:])
    assert same(tables(first), tables(loaded))
    assert same(tables(first), tables(resumed))
    assert not same(tables(first), tables(whole))
    assert torch.equal(read(first.host, x), read(loaded.host, x))
    assert {len(table) for name, table in whole.codebook.named_buffers() if name == "edits"} != {6}


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    x = make_inputs("ours")
    grace, other, gpt2 = attach("ours"), attach("ours", radius=2.0), attach("gpt2", site="transformer.h.0.mlp")
    grace.edit([edit_of(x[:1], 3)])
    before = tables(grace)
    other.save(tmp_path / "radius")
    gpt2.save(tmp_path / "gpt2")
    (tmp_path / "text").write_text("no codebook")
    for name, said in (("radius", "radius=2.0, this one has 0.001"), ("gpt2", "sites="), ("text", "is no file")):
        with pytest.raises(ValueError, match=said):
            grace.load(tmp_path / name)
        assert same(tables(grace), before)
    assert int(read(grace.host, x)[0, -1].argmax()) == 3


def test_reset_starts_the_same_stream_again() -> None:
    x = make_inputs("ours")
    grace = attach("ours")
    edits = [edit_of(row[None], 3) for row in x]
    grace.edit(edits)
    first = tables(grace)
    grace.reset()
    assert not len(grace.codebook)
    grace.edit(edits)
    assert same(tables(grace), first)


def test_its_memory_is_what_it_says() -> None:
    """An entry ``width + dim`` numbers, an edit of an entry ``dim``."""
    grace = attach("ours", steps=1)
    x = make_inputs("ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            grace.edit([edit_of(row[None], 3) for row in x])
    numbers = sum(t.numel() for t in grace.state_dict().values() if t.is_floating_point() and t.dim() == 2)
    assert numbers == 2 * (24 + 16) + 8 * 16
