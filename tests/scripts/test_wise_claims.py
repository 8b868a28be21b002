"""What the claims of WISE measure."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from memzoo.arch import create_model
from memzoo.layers import Wise
from memzoo.lit_modules.model_editing import attach_editor, edit_of

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def claims() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    yield import_module("claims.wise")
    sys.path.remove(str(SCRIPTS))


def editing(claims: ModuleType) -> Iterator[dict]:
    for claim in claims.CLAIMS.claims.values():
        yield from (settings for settings in claim.variants.values() if "editor" in settings)


def test_every_variant_is_an_editor_with_these_options(claims):
    host = create_model("transformer_tiny", depth=1)
    for settings in editing(claims):
        attach_editor(host, settings["editor"], settings["options"]).detach()


def test_no_fact_that_is_edited_is_asked_for_locality_or_shown(claims):
    for count in (50, 200):
        edits = claims.facts(0, count).edits
        edited = {wording for fact in edits for wording in (fact.prompt, *fact.paraphrases)}
        shown, asked = {fact.unrelated for fact in edits}, {local.prompt for fact in edits for local in fact.locality}
        assert len({fact.prompt for fact in edits}) == count
        assert not edited & (shown | asked)
        assert not shown & asked


def test_with_the_whole_host_in_every_step_an_edit_is_the_same(claims):
    host = create_model("transformer_tiny", vocab_size=1024, dim=16, depth=4, num_heads=2).eval()
    edit = edit_of(next(iter(claims.facts(0, 2).edit_dataloader())))
    learned = []
    for whole in (False, True):
        editor = Wise.attach(host, max_steps=3)
        calls: list[int] = []
        handle = host.blocks[0].mixer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if whole:
            with claims.whole_host():
                editor.edit([edit])
        else:
            editor.edit([edit])
        handle.remove()
        learned.append((editor.delta.detach().clone(), len(calls)))
        editor.detach()
    assert torch.equal(learned[0][0], learned[1][0])
    assert learned[0][0].any()
    assert learned[1][1] > learned[0][1]  # the layers below ran again


@pytest.mark.parametrize("name", ["fifty", "time"])
def test_a_run_of_every_kind_measures_what_is_shown(claims, name):
    claim = claims.CLAIMS.claims[name]
    settings = claims.shorten(next(iter(claim.variants.values())))
    found = claims.measure(settings, 0)
    assert found.keys() == claim.columns.keys() | ({"seconds an edit"} if name == "fifty" else set())
