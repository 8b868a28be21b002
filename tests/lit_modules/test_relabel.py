"""RelabelData: edits of a classifier, and what is asked after them."""

import sys
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from memzoo.lit_modules import RelabelData
from memzoo.lit_modules.data.relabel import SHIFTS, load_digits, shift

SMALL = {"image_size": 8, "num_edits": 3, "held_out": 10, "validation": 6, "batch_size": 4, "num_paraphrases": 2}


def pictures(count: int = 30) -> dict[str, Tensor]:
    """Return images of three classes: bright above, below, or on the left."""
    labels = torch.arange(count) % 3
    bright = torch.full((3, 1, 6, 6), -1.0)
    bright[0, :, :3], bright[1, :, 3:], bright[2, :, :, :3] = 1.0, 1.0, 1.0
    noise = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return {"images": bright[labels] + 0.1 * noise, "labels": labels}


def small(**options: Any) -> RelabelData:
    return RelabelData(**pictures(), **SMALL | options)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# The stream


def test_an_edit_shows_an_image_and_noised_copies_with_another_class():
    data = small(noise=0.5, num_copies=3)
    for relabel in data.edits:
        edit = data.encode_edit(relabel)
        assert relabel.target != relabel.original == int(data.labels[relabel.image])
        assert edit.targets.tolist() == [relabel.target] * 4
        assert edit.label == relabel.target < data.num_classes == 3
        assert edit.inputs.shape == (4, 3, 8, 8)
        assert torch.equal(edit.inputs[:1], data.fit_size(data.images[[relabel.image]]))
        assert torch.equal(edit.unrelated, data.fit_size(data.images[[relabel.unrelated]]))
        assert edit.asked is None
        added = edit.inputs[1:] - edit.inputs[:1]
        assert (added.abs().flatten(1).amax(1) > 0.1).all()
        assert len({tuple(row.tolist()) for row in added.flatten(1)}) == 3


def test_no_image_has_two_uses():
    data = small()
    edited = {edit.image for edit in data.edits}
    unrelated = {edit.unrelated for edit in data.edits}
    local = [image for edit in data.edits for image in edit.locality]
    assert len(edited) == len(unrelated) == 3
    assert len(local) == len(set(local)) == 3  # half of the seven others
    trained = [loader.dataset for loader in (data.train_dataloader(), *data.val_dataloader())]
    assert [len(rows) for rows in trained] == [14, 6]
    rows = [row["inputs"] for images in trained for row in images]
    assert not edited & unrelated
    assert not (edited | unrelated) & set(local)
    held_out = data.fit_size(data.images[[*edited, *unrelated, *local]])
    distances = torch.cdist(held_out.flatten(1), torch.stack(rows).flatten(1))
    assert distances.min() > 0


def test_a_longer_stream_begins_like_a_shorter_one():
    short, long = ([(e.image, e.target) for e in small(num_edits=count).edits] for count in (3, 8))
    assert short == long[:3]
    assert short != [(edit.image, edit.target) for edit in small(seed=1).edits]
    assert [len(edit.locality) for edit in small(num_edits=8).edits] == [1] * 8


def test_the_stream_has_the_edits_in_order_from_any_number():
    data = small()
    every = list(data.edit_dataloader())
    assert [sorted(batch) for batch in every] == [["index", "inputs", "targets", "unrelated"]] * 3
    assert [batch["index"].tolist() for batch in every] == [[0], [1], [2]]
    [rest] = small().edit_dataloader(start=2)
    assert same(rest, every[2])
    for loader in (data.predict_dataloader(), small(train_on="edits").train_dataloader()):
        assert all(same(one, other) for one, other in zip(loader, every, strict=True))
    assert small(train_on="edits").val_dataloader() == []


# Questions


def test_paraphrases_are_shifted_and_locality_asks_with_other_images():
    data = small()
    edits = [data.edits[number] for number in (2, 0)]
    expected = {
        "edit": [(edit.image, edit.target, (0, 0)) for edit in edits],
        "paraphrase": [(edit.image, edit.target, by) for edit in edits for by in SHIFTS[:2]],
        "locality": [(image, int(data.labels[image]), (0, 0)) for edit in edits for image in edit.locality],
    }
    for kind, rows in expected.items():
        batches = data.questions([2, 0], kind)
        inputs, targets, index = (
            torch.cat([batch[name] for batch in batches]) for name in ("inputs", "targets", "index")
        )
        images = torch.stack([shift(data.images[image], *by) for image, _, by in rows])
        torch.testing.assert_close(inputs, data.fit_size(images))
        assert targets.tolist() == [target for _, target, _ in rows]
        assert index.tolist() == [number for number in (2, 0) for _ in range(len(rows) // 2)]
        assert all(len(batch["index"]) <= 4 for batch in batches)


def test_a_shift_moves_every_pixel_and_repeats_the_edge():
    image = torch.arange(9.0).view(1, 3, 3)
    assert shift(image, 1, 0)[0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
    assert shift(image, 0, -1)[0].tolist() == [[1, 2, 2], [4, 5, 5], [7, 8, 8]]
    assert len(set(SHIFTS) - {(0, 0)}) == len(SHIFTS) == 8


def test_images_are_what_the_model_was_built_for():
    assert small(image_size=16, channels=1).questions([0], "edit")[0]["inputs"].shape == (1, 1, 16, 16)
    colours = torch.rand(30, 3, 8, 8)
    data = RelabelData(colours, pictures()["labels"], **SMALL)
    assert torch.equal(data.fit_size(colours), colours)


# A classifier


def test_a_vit_learns_the_classes():
    torch.manual_seed(0)
    data = small()
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    loader = data.train_dataloader()
    for epoch in range(20):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(batch["inputs"]), batch["targets"]).backward()
            optimizer.step()
    [validation] = data.val_dataloader()
    model.eval()
    asked = [*validation, *data.questions(range(3), "locality")]
    with torch.no_grad():
        assert all((model(batch["inputs"]).argmax(-1) == batch["targets"]).all() for batch in asked)


def test_the_digits_are_the_default():
    pytest.importorskip("sklearn", reason="digits come with scikit-learn")
    data = RelabelData()
    assert data.images.shape == (1797, 1, 8, 8)
    assert (data.images.min(), data.images.max(), data.num_classes) == (-1, 1, 10)
    assert data.encode_edit(data.edits[0]).inputs.shape == (5, 3, 32, 32)


def test_without_scikit_learn_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"images=None are the digits of scikit-learn, which is missing; pip install"):
        load_digits()


# Refusals and the command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_edits": 0}, "num_edits=0"),
        ({"num_edits": 9}, "num_edits=9 leaves fewer than two of held_out=10 images unedited, .*; use at most 8"),
        ({"num_copies": -1}, "num_copies=-1 is negative"),
        ({"noise": -0.5}, r"noise=-0\.5 is not a finite number >= 0"),
        ({"num_paraphrases": 9}, r"num_paraphrases=9 is not within \[0, 8\]"),
        ({"train_on": "edit"}, "train_on='edit' is not one of .*did you mean 'edits'"),
        ({"held_out": 24}, "held_out and validation take 30 of 30 images and leave none"),
        ({"labels": None}, "images and labels go together"),
        ({"images": torch.zeros(30, 6, 6)}, r"images have shape \(30, 6, 6\)"),
        ({"images": torch.zeros(30, 2, 6, 6)}, "images have 2 channels, channels=3"),
        ({"labels": torch.zeros(29, dtype=torch.long)}, r"labels have shape \(29,\)"),
        ({"labels": torch.full((30,), -1)}, "the least is -1"),
        ({"labels": torch.zeros(30, dtype=torch.long)}, "labels are all 0"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RelabelData(**pictures() | SMALL | options)


def test_there_are_three_kinds_of_questions():
    with pytest.raises(ValueError, match=r"kind='edits' is not one of .*did you mean 'edit'"):
        small().questions([0], "edits")


def test_the_command_line_sets_its_arguments():
    parser = ArgumentParser()
    parser.add_class_arguments(RelabelData, "data")
    given = parser.parse_args(["--data.num_edits", "3", "--data.train_on", "edits"]).data.as_dict()
    assert RelabelData(**given | SMALL | pictures()).train_on == "edits"
