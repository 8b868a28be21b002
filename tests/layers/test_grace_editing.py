"""GRACE: what an edit trains, what is refused, and files that a stream goes on from."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from memzoo.layers import Grace, layer_entry
from memzoo.layers.editor import NOT_SCORED, Edit
from tests.layers.grace_cases import attach, edit_of, same, site_call, tables
from tests.layers.side_hosts import HOSTS, make_host, make_inputs, read

BOTH = pytest.mark.parametrize("wrap", [False, True], ids=["hooks", "wrappers"])


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
