"""What editors hold after 1,000 edits: what their pages say, and no more."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from memzoo.arch import create_model
from memzoo.layers import layer_entry
from memzoo.layers.editor import NOT_SCORED, Edit, Editor
from memzoo.lit_modules.editing_metrics import memory_bytes

DIM, WIDTH = 16, 32
MATRIX = DIM * WIDTH * 4
QUESTIONS = 32 * (6 * (4 * WIDTH + 1) + 2 * 8)  # stored: what the site reads of six tokens, which count, whose it is
LEARNING = {"wise": "max_steps", "grace": "steps", "fine_tuning": "max_steps", "rome": "max_steps"}


def held(name: str, marks: tuple[int, ...], **options: Any) -> list[int]:
    """The bytes that an editor holds after some numbers of edits."""
    torch.manual_seed(0)
    host = create_model("transformer_tiny", vocab_size=256, dim=DIM, depth=1, num_heads=2, hidden_dim=WIDTH).eval()
    editor: Editor = layer_entry(name).build(host, **{LEARNING[name]: 1}, **options)
    generator, found = torch.Generator().manual_seed(0), []
    for number in range(1, marks[-1] + 1):
        question, answer, unrelated = (torch.randint(1, 256, (1, n), generator=generator) for n in (6, 1, 6))
        targets = torch.cat([torch.full((1, 5), NOT_SCORED), answer], 1)
        editor.edit([Edit(question, targets, unrelated=unrelated)])
        if number in marks:
            found.append(memory_bytes(editor))
    assert int(editor.num_edits) == marks[-1]
    return found


@pytest.mark.slow
def test_wise_merge_is_bounded_by_its_shards() -> None:
    """The open one, two finished, eight that were kept, a memory; what is kept goes where the first eight are full."""
    sizes = held("wise", tuple(range(50, 1001, 50)), edits_per_shard=25, shards_per_merge=2, keep_shards=8)
    assert set(sizes[4:]) == {sizes[-1]}
    assert max(sizes) < (1 + 2 + 8 + 1) * MATRIX + QUESTIONS + 1024
    assert sizes[-1] < (1 + 1) * MATRIX + QUESTIONS + 1024


@pytest.mark.slow
def test_wise_retrieve_holds_a_memory_with_its_questions_more_for_every_two_shards() -> None:
    options = {"mode": "retrieve", "edits_per_shard": 25, "shards_per_merge": 2, "keep_shards": 8}
    sizes = held("wise", tuple(range(250, 1001, 50)), **options)
    assert {later - earlier for earlier, later in pairwise(sizes)} == {MATRIX + QUESTIONS + 4 + 8}  # threshold, number


@pytest.mark.slow
def test_fine_tuning_holds_one_matrix() -> None:
    assert held("fine_tuning", (1, 1000)) == [MATRIX + 8] * 2


@pytest.mark.slow
def test_grace_holds_an_entry_more_an_edit() -> None:
    sizes = held("grace", (250, 500, 750, 1000), radius=1e-4)
    grown = [later - earlier for earlier, later in pairwise(sizes)]
    entry = 4 * (WIDTH + DIM + 1) + 32 + 8  # key, value and radius, label, number of the edit
    assert grown == [250 * entry] * 3
    assert sizes[0] - 250 * entry == 2 * 8


@pytest.mark.slow
def test_rome_holds_two_vectors_more_an_edit() -> None:
    sizes = held("rome", (250, 500, 1000))
    assert sizes == [edits * (4 * (WIDTH + DIM) + 8) + 8 for edits in (250, 500, 1000)]  # and the number of the call
