"""Streams of edits: what they go on with after a kill, what their edits lack, and what they do to a scale."""

import math
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import ConcatDataset

from memzoo.arch import create_model
from memzoo.layers import Wise
from memzoo.lit_modules import FactData
from memzoo.lit_modules.data.relabel import RelabelData
from memzoo.lit_modules.data.rows import ResumableLoader, RowSampler
from memzoo.lit_modules.editing_figures import measure_line
from memzoo.lit_modules.editing_metrics import EditRecord, right_after
from memzoo.lit_modules.editing_stream import describe_data, describe_editor
from tests.lit_modules.editing_cases import SIZES, Facts, host, module, padded, register_dense, trainer

WISE = {"editor": "wise", "editor_options": {"max_steps": 1}}
IMAGES = {"image_size": 8, "num_edits": 3, "num_copies": 1, "held_out": 7, "validation": 1, "train_on": "edits"}
UNRELATED = "no edit of the stream has an unrelated question"


@pytest.fixture(autouse=True)
def _dense(monkeypatch):
    register_dense(monkeypatch)


def fitted(data, path=None, *, options=None, **arguments):
    lit = module(**{"generate": False} | arguments)
    run = trainer(**(options or {}))
    run.fit(lit, datamodule=data, ckpt_path=path)
    return lit, run


def killed(folder, data, after: int, **arguments) -> str:
    """Return the checkpoint of a stream that ended early."""
    saved = ModelCheckpoint(folder, "last", every_n_train_steps=after)
    run = trainer(saved, enable_checkpointing=True, max_steps=after)
    run.fit(module(**{"generate": False} | arguments), datamodule=data)
    return str(folder / "last.ckpt")


class Grouped(Facts):
    """Facts of which so many are learned together."""

    def __init__(self, together: int) -> None:
        super().__init__(6)
        self.together = together

    def train_dataloader(self):
        rows = super().train_dataloader().dataset
        batches = ConcatDataset(
            [[[rows[i] for i in range(first, first + self.together)] for first in range(0, 6, self.together)]]
        )
        return ResumableLoader(batches, sampler=RowSampler(batches, 1, contiguous=True), batch_size=None)


# What a stream goes on with


@pytest.mark.parametrize(
    ("editor", "made", "other"),
    [
        ("dense", {"learning_rate": 0.1}, {"learning_rate": 0.2}),
        ("fine_tuning", {"max_steps": 1}, {"max_steps": 1, "l2": 1.0}),
        ("fine_tuning", {"max_steps": 1}, {"max_steps": 1, "optimizer": "sgd"}),
    ],
    ids=["rate", "l2", "optimizer"],
)
def test_other_options_of_the_editor_are_refused(editor, made, other, tmp_path):
    path = killed(tmp_path, Facts(4), 2, editor=editor, editor_options=made)
    with pytest.raises(ValueError, match=r"stream with editor_options=\{.*\} and not \{.*\}; go on with"):
        fitted(Facts(4), path, editor=editor, editor_options=other)
    lit, _ = fitted(Facts(4), path, editor=editor, editor_options=made)
    assert [record.index for record in lit.records] == [0, 1, 2, 3]


def test_options_are_described_by_name_and_alike_in_every_run():
    def optimizer(rate: float):
        return partial(torch.optim.SGD, lr=rate)

    editor = Wise.attach(host())
    first, again, other = (describe_editor(editor, {"optimizer": optimizer(rate)}) for rate in (0.1, 0.1, 0.2))
    assert first == again != other
    assert first["editor_options"] == {"optimizer": ["SGD", [], {"lr": 0.1}]}
    named = describe_editor(editor, {"optimizer": test_options_are_described_by_name_and_alike_in_every_run})
    assert named["editor_options"] == {"optimizer": "test_options_are_described_by_name_and_alike_in_every_run"}
    assert describe_editor(editor, {"seed": 0})["editor_options"] == {}  # the editor itself says its seed


def test_another_number_of_edits_together_is_refused(tmp_path):
    """A loader counts batches: of another size, edits would be left out or made twice."""
    path = killed(tmp_path, Grouped(1), 2)
    with pytest.raises(ValueError, match="holds the first 2 edits, and its stream would go on with number 4 and not 2"):
        fitted(Grouped(2), path)
    lit, _ = fitted(Grouped(1), path)
    assert [record.index for record in lit.records] == [0, 1, 2, 3, 4, 5]


def test_what_the_data_hand_out_is_described():
    def facts(**options):
        return describe_data(FactData(num_facts=12, num_edits=3, num_prefixes=1, train_on="edits", **options))

    own = facts()
    assert facts() == own
    assert facts(batch_size=1) == own
    assert own["edits"] == 3
    for options, differs in (
        ({"edits_per_batch": 2}, {"edits_per_batch"}),
        ({"unrelated_answers": True}, {"tensors_sha256"}),
        ({"seed": 1}, {"edits_sha256", "tensors_sha256"}),
    ):
        other = facts(**options)
        assert {name for name, value in own.items() if other[name] != value} == differs


def test_images_and_what_is_made_of_them_are_described():
    def images(seed=0, **options):
        drawn = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        return describe_data(RelabelData(drawn, torch.arange(9) % 5, **IMAGES | options))["tensors_sha256"]

    own = images()
    assert images(batch_size=2) == own
    others = [images(1), images(num_copies=2), images(noise=0.2), images(num_paraphrases=2)]
    assert own not in others


# Edits that lack questions


class Gaps(Facts):
    """Of three edits the second has two paraphrases and no question of locality, the others no paraphrase."""

    def __init__(self) -> None:
        super().__init__(3)

    def questions(self, edits, kind):
        counts = {"edit": [1, 1, 1], "paraphrase": [0, 2, 0], "locality": [1, 0, 1]}[kind]
        for number in edits:
            if count := counts[number]:
                yield padded([self.rows(number, kind)] * count) | {"index": torch.tensor([number] * count)}


def test_an_edit_without_a_question_of_a_kind_leaves_the_means_of_the_others():
    lit, run = fitted(Gaps())
    assert [math.isnan(record.generalisation) for record in lit.records] == [True, False, True]
    assert [math.isnan(record.locality) for record in lit.records] == [False, True, False]
    assert [record.generalisation_questions for record in lit.records] == [0, 2, 0]
    logged = run.callback_metrics
    local = [lit.records[0].locality, lit.records[2].locality]
    assert logged["just_edited/mean_generalisation"] == pytest.approx(lit.records[1].generalisation)
    assert logged["just_edited/mean_locality"] == pytest.approx(sum(local) / 2)
    assert not any(value.isnan() for name, value in logged.items() if "just_edited" in name)
    line = measure_line("generalisation", lit.evaluations[-1], lit.records)
    assert " of 2 questions after the last of 3 edits (" in line


def test_the_mean_right_after_each_edit_is_over_questions_as_that_after_the_last_is():
    nan = math.nan
    counts = [{"generalisation_questions": count} for count in (0, 3, 1)]
    records = [
        EditRecord(number, 1, 0.0, 0.0, 1.0, value, nan, **told)
        for number, (value, told) in enumerate(zip((nan, 1.0, 0.0), counts, strict=True))
    ]
    means = right_after(records, "generalisation")
    assert means.isnan().tolist() == [True, False, False]
    assert means[1:].tolist() == [1.0, 0.75]
    assert right_after(records, "reliability").tolist() == [1, 1, 1]
    assert len(right_after(records, "locality")) == 0
    assert measure_line("locality", {}, records) == "locality: no edit of 3 has such a question"


def test_a_router_that_nothing_can_teach_is_warned_of_once(tmp_path):
    with pytest.warns(UserWarning, match=UNRELATED) as caught:
        fitted(Facts(3), **WISE)
    assert sum(UNRELATED in str(one.message) for one in caught) == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted(Facts(2))  # an editor without a router
        data = FactData(num_facts=6, num_edits=2, num_prefixes=1, train_on="edits")
        model = create_model("transformer_tiny", **SIZES | {"vocab_size": data.vocab_size})
        fitted(data, model=model, **WISE)
    assert not any(UNRELATED in str(one.message) for one in caught)


# The scale, precision


def test_a_scale_that_was_measured_before_stays():
    generic = torch.randint(23, (16, 8), generator=torch.Generator().manual_seed(1))
    lit = module(generate=False, **WISE)
    lit.editor.calibrate(generic)
    scale = lit.editor.scale.clone()
    for count in (3, 2):
        trainer().fit(lit, datamodule=Facts(count))
        assert torch.equal(lit.editor.scale, scale)
    other, _ = fitted(Facts(3), **WISE)  # the first edit measures
    assert not torch.equal(other.editor.scale, scale)
    measured = other.editor.scale.clone()
    trainer().fit(other, datamodule=Facts(3))
    assert torch.equal(other.editor.scale, measured)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_images_are_of_the_precision_of_the_trainer(precision):
    timm = pytest.importorskip("timm.models.vision_transformer", reason="a ViT needs timm")
    torch.manual_seed(0)
    model = timm.VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5)
    images = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = RelabelData(images, torch.arange(9) % 5, **IMAGES)
    lit, _ = fitted(data, model=model, options={"precision": precision}, **WISE)
    assert lit.evaluations[-1]["count"] == 3
    assert next(lit.model.parameters()).dtype == {"64": torch.float64, "bf": torch.bfloat16}[precision[:2]]
