"""ClusteredTextData: windows of real text, packed by leaf, cached, and routed by their own text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from memzoo.lit_modules import CausalLMModule
from memzoo.lit_modules.data import ClusteredTextData
from memzoo.lit_modules.data.clustered_text import Windows
from memzoo.lit_modules.data.rows import Span
from memzoo.lit_modules.objective import NextTokens
from tests.lit_modules.clustered_text_cases import Counted, folders, small, texts_of, write_documents

STEPS = 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "docs")


def test_windows_are_the_documents_without_gap_or_overlap(folder: Path) -> None:
    data = small(folder)
    data.prepare_data()
    cache = data._spans()[0][0]
    windows = Windows(cache, [Span(3, 0, cache.documents[3].tokens), Span(1, 10, 50)], 32)
    assert windows.lengths.tolist() == [32, 32, 32, 30, 32, 8]
    texts = [data.decode(window.tolist()) for window in windows]
    assert "".join(texts[:4]) == (folder / cache.documents[3].name).read_text()
    assert "".join(texts[4:]) == (folder / cache.documents[1].name).read_text()[10:50]


def test_rows_hold_every_window_once_with_the_path_of_its_text(folder: Path) -> None:
    data = small(folder)
    held = 0
    for rows in (data.training_rows, data.validation_rows):
        texts = texts_of(data, rows)
        paths = data.tree.route(data.embed([text for text, _ in texts])).tolist()
        assert [path for _, path in texts] == paths
        held += sum(len(text) for text, _ in texts)
        assert all(len(text) <= 32 for text, _ in texts)
    assert held == sum(len(path.read_text()) for path in folder.iterdir())


def test_batches_are_what_next_tokens_takes(folder: Path) -> None:
    data = small(folder)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert set(batch) == {"tokens", "paths", "doc_ids", "mask"}
            assert batch["tokens"].shape[1] == 33
            tokens = NextTokens.of(batch)
            assert not (tokens.counted & ~batch["mask"][:, 1:]).any()
            assert (batch["paths"][:, 0] == batch["paths"][:, 1] // 2).all()
            texts = [data.decode(row) for row in batch["tokens"].tolist()]
            assert torch.equal(data.embed(batch["tokens"]), data.embed(texts))
    assert data.bytes_per_token == 1.0
    assert data.vocab_size == 256


def test_validation_mixes_leaves_in_one_order_and_prediction_goes_leaf_by_leaf(folder: Path) -> None:
    data = small(folder, validation_fraction=0.5)
    rows = data.validation_rows
    predicted = torch.cat([batch["tokens"] for batch in data.predict_dataloader()])
    assert torch.equal(predicted, torch.stack([row["tokens"] for row in rows]))
    leaves = len(rows.leaves.unique())
    assert leaves > 2
    assert len(rows.leaves[:8].unique()) < leaves  # which the first two batches would else be
    for loader in (data.val_dataloader(), data.test_dataloader()):
        batches = list(loader)
        assert len(torch.cat([batch["paths"] for batch in batches[:2]]).unique(dim=0)) == leaves
        tokens = torch.cat([batch["tokens"] for batch in batches])
        assert sorted(tokens.tolist()) == sorted(predicted.tolist())
        assert torch.equal(tokens, torch.cat([batch["tokens"] for batch in data.val_dataloader()]))
    other = small(folder, validation_fraction=0.5, seed=1, tree=data.cache_dir / folders(data)[0] / "tree.safetensors")
    assert not torch.equal(tokens, torch.cat([batch["tokens"] for batch in other.val_dataloader()]))


def test_validation_is_of_the_subtree_that_is_trained(folder: Path) -> None:
    counts = dict.fromkeys(range(2), 0)
    for node in counts:
        data = small(folder, within=(1, node))
        for loader in (data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()):
            assert all((batch["paths"][:, 0] == node).all() for batch in loader)
        counts[node] = sum(len(batch["tokens"]) for batch in data.val_dataloader())
    assert all(counts.values())
    assert sum(counts.values()) == len(data.validation_rows)


def test_a_node_without_validation_rows_is_named(folder: Path) -> None:
    leaves = small(folder, depth=3).validation_rows.leaves
    empty = next(leaf for leaf in range(8) if leaf not in leaves)
    data = small(folder, depth=3, within=(3, empty))
    with pytest.raises(ValueError, match=rf"within=\(3, {empty}\) holds none of the {len(leaves)} validation rows"):
        data.val_dataloader()


@pytest.mark.parametrize("within", [None, (1, 0)])
@pytest.mark.parametrize("pack_documents", [True, False])
@pytest.mark.parametrize("end_of_text", [None, 0])
def test_bytes_per_token_are_of_the_targets(
    within: tuple[int, int] | None, pack_documents: bool, end_of_text: int | None, folder: Path
) -> None:
    data = small(folder, within=within, pack_documents=pack_documents, end_of_text=end_of_text)
    targets = [batch.targets[batch.counted] for batch in map(NextTokens.of, data.val_dataloader())]
    assert data.bytes_per_token == pytest.approx(float((torch.cat(targets) != 0).double().mean()), abs=1e-12)
    assert (data.bytes_per_token < 1) == (end_of_text is not None)


def test_bytes_per_token_are_of_the_node_where_its_text_is_denser(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (folder := tmp_path / "docs").mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text((f"{i} " + ("aaaa", "éééé")[i % 2] * 40)[:96])

    class Letters(Counted):
        """Tokens are characters, and vectors say which half of them a text has."""

        def embed(self, texts: Sequence[str]) -> Tensor:
            return torch.eye(2)[[int("é" in text) for text in texts]]

    found = {}
    for within in (None, (1, 0), (1, 1)):
        data = small(
            folder, tokenizer=characters(tmp_path), embedder=Letters(), window=96, depth=1, within=within,
            validation_paths=folder,
        )  # fmt: skip
        found[within] = data.bytes_per_token
    assert sorted(found.values()) == pytest.approx([1, (96 + 190) / 192, 190 / 96])


def characters(folder: Path) -> Path:
    """Write a tokenizer with a token for every character of the test above."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate("aé 01234567")}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_validation_may_be_routed_by_its_beginning(folder: Path) -> None:
    whole, prefix = Counted(), Counted()
    small(folder, embedder=whole).prepare_data()
    data = small(folder, embedder=prefix, route_prefix=5)
    data.prepare_data()
    count = len(texts_of(data, data.validation_rows))
    assert prefix.texts[:-count] == whole.texts[:-count]  # training, on the whole windows
    assert prefix.texts[-count:] == [text[:5] for text in whole.texts[-count:]]


class Noting(CausalLMModule):
    def on_fit_start(self) -> None:
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.seen.append(batch["tokens"].tolist())
        return super().training_step(batch, index)


def fit(data: ClusteredTextData, tmp_path: Path, *callbacks: pl.Callback, ckpt_path: Path | None = None) -> Noting:
    torch.manual_seed(0)
    module = Noting("transformer_tiny", {"dim": 16, "depth": 1, "num_heads": 2}, schedule="constant")
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=STEPS,
        logger=False,
        callbacks=[*callbacks],
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_resumes_within_an_epoch_from_a_checkpoint_that_rebuilds_the_data(
    folder: Path, tmp_path: Path
) -> None:
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    whole = fit(small(folder, level=1), tmp_path, saver)
    assert len(small(folder, level=1).train_dataloader()) == 15  # so each of these is within an epoch
    for step in (5, 10, 20, 25):
        path = tmp_path / f"step={step}.ckpt"
        data = ClusteredTextData.load_from_checkpoint(path, weights_only=True)
        rest = fit(data, tmp_path, ckpt_path=path)
        assert rest.seen == whole.seen[step:]
        for name, parameter in rest.state_dict().items():
            assert torch.equal(parameter, whole.state_dict()[name])


def test_arguments_are_kept_as_plain_values(folder: Path, tmp_path: Path) -> None:
    tree = small(folder).tree
    tree.save(tmp_path / "tree.safetensors")
    data = small(folder, tree=tmp_path / "tree.safetensors", embedder=Counted())
    kept = dict(data.hparams)
    assert json.loads(json.dumps(kept)) == kept
    assert kept["tree"] == str(tmp_path / "tree.safetensors")
    assert "embedder" not in kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, r"window=0 is not a whole number >= 1"),
        ({"route_prefix": 0}, r"route_prefix=0 is not a whole number >= 1"),
        ({"end_of_text": 256}, r"end_of_text=256 is no token; ids are within \[0, 256\)"),
        ({"tails": "cut"}, r"tails='cut' is not one of 'pad', 'drop'"),
        ({"level": 3}, r"level=3 is not in the tree"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        small(folder, **options)


def test_too_little_text_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"sequence_length=5000 needs 5001 tokens in the training split"):
        small(folder, sequence_length=5000).prepare_data()
