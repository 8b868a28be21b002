import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch.utils.data import DataLoader

from memzoo.lit_modules import CausalLMModule
from memzoo.lit_modules.data import BookChunks, BookStreamData, TextData
from memzoo.lit_modules.data.corpus import NOT_SOURCES, find_longest_files, find_text_files
from memzoo.lit_modules.data.shards import TokenCache
from memzoo.lit_modules.objective import NOT_SCORED, NextTokens
from tests.lit_modules.book_stream_cases import BOOKS, on_devices, quiet, scored, small, streamed, write_documents


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "docs")


def read(rows: Any) -> str:
    return bytes(token for row in rows for token in row["tokens"][:-1].tolist()).decode(errors="replace")


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=4),
    chunk_length=st.integers(1, 12),
    prefix_length=st.integers(0, 20),
)
def test_every_token_but_the_first_is_a_target_once_behind_what_comes_before_it(
    lengths: list[int], chunk_length: int, prefix_length: int
):
    starts = np.cumsum([0, *lengths]).tolist()
    books = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]
    window = chunk_length + prefix_length
    chunks = BookChunks(books, chunk_length=chunk_length, window=window)
    batches = list(DataLoader(chunks))
    assert len(batches) == len(chunks) == sum(-(-(length - 1) // chunk_length) for length in lengths)
    assert streamed(batches) == {i: book[1:].tolist() for i, book in enumerate(books)}
    assert chunks.num_targets == sum(len(scored(batch)) for batch in batches)
    last, done = -1, 0
    for batch in batches:
        document, chunk, position, prefix = (int(batch[name]) for name in ("document", "chunk", "position", "prefix"))
        done = done if document == last else 0
        assert (position, chunk) == (done, done // chunk_length)
        assert prefix == min(prefix_length, position)
        inputs = batch["tokens"][0, :-1]
        assert len(inputs) <= window
        assert torch.equal(batch["tokens"][0], books[document][position - prefix :][: len(inputs) + 1])
        assert not NextTokens.of(batch).counted[0, :prefix].any()
        assert len(inputs) - prefix == len(scored(batch)) <= chunk_length
        last, done = document, done + len(scored(batch))


@pytest.mark.parametrize(
    ("length", "last"), [(2, [1]), (8, [7]), (9, [8]), (10, [8, 1]), (17, [8, 8]), (18, [8, 8, 1])]
)
def test_only_the_last_chunk_is_shorter(length: int, last: list[int]):
    chunks = BookChunks([torch.arange(length)], chunk_length=8, window=11)
    assert [len(scored(batch)) for batch in DataLoader(chunks)] == last


def test_a_chunk_by_hand():
    chunk = BookChunks([[7, 7], list(range(10))], chunk_length=4, window=6)[2]
    assert {name: value.tolist() for name, value in chunk.items()} == {
        "tokens": [2, 3, 4, 5, 6, 7, 8],
        "labels": [NOT_SCORED, NOT_SCORED, NOT_SCORED, 5, 6, 7, 8],
        "document": 1,
        "chunk": 1,
        "position": 4,
        "prefix": 2,
    }
    assert {value.dtype for value in chunk.values()} == {torch.int64}


@pytest.mark.parametrize("book", [list(range(9)), np.arange(9, dtype=np.uint16), torch.arange(9, dtype=torch.int32)])
def test_tokens_come_as_lists_arrays_and_tensors(book: Any):
    [batch] = DataLoader(BookChunks([book], chunk_length=8, window=8))
    assert batch["tokens"].tolist() == [list(range(9))]
    assert batch["tokens"].dtype == torch.int64


def test_what_is_no_chunk_has_no_index():
    chunks = BookChunks([[1, 2], [3, 4, 5]], chunk_length=1, window=1)
    assert [list(chunks.chunks_of(book)) for book in range(2)] == [[0], [1, 2]]
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"chunk {index} of 3"):
            chunks[index]


def test_short_books_of_one_s_own_are_named():
    for books, message in [([[1, 2], [1]], r"books\[1\] has 1 tokens"), ([], "books is empty")]:
        with pytest.raises(ValueError, match=rf"{message}; a stream needs books of at least 2"):
            BookChunks(books)


def test_the_test_loader_streams_the_files_in_the_order_of_their_names(folder: Path):
    data = small(folder)
    assert data.book_names == list(BOOKS)
    texts = [text.encode() for text in BOOKS.values()]
    assert streamed(data.test_dataloader()) == {i: list(text[1:]) for i, text in enumerate(texts)}
    assert data.test_tokens == sum(map(len, texts)) - 3
    assert data.test_bytes_per_token == 1.0
    batch = list(data.test_dataloader())[1]
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "tokens": (1, 17),
        "labels": (1, 17),
        "document": (1,),
        "chunk": (1,),
        "position": (1,),
        "prefix": (1,),
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_only_the_beginning_is_streamed_if_asked(folder: Path):
    data = small(folder, max_book_tokens=30)
    beginnings = [text.encode()[:30] for text in BOOKS.values()]
    assert streamed(data.test_dataloader()) == {i: list(text[1:]) for i, text in enumerate(beginnings)}
    assert data.test_tokens == sum(map(len, beginnings)) - 3
    assert len(beginnings[1]) == len(BOOKS["bovary.txt"].encode()) < 30  # a shorter book is streamed whole


def test_books_and_copies_of_them_are_not_trained_or_validated_on(folder: Path):
    (folder / "10-copy.txt").write_text(BOOKS["ahab.txt"])
    data = small(folder)
    text = read(data.training_rows) + read(data.validation_rows)
    assert "line 07.1" in text
    assert "Ishmael" not in text
    assert "Uma noite" not in text
    plain = TextData(folder, suffixes=".txt", sequence_length=16, validation_fraction=0.2)
    assert "Ishmael" in read(plain.training_rows) + read(plain.validation_rows)


def test_all_else_is_as_without_the_books(folder: Path, tmp_path: Path):
    (held := tmp_path / "held.txt").write_text("held out by hand " * 10)
    shared = {"sequence_length": 16, "batch_size": 4, "validation_fraction": 0.2}
    for options, without in (
        ({}, {}),
        ({"val_sequence_lengths": [32]}, {"val_sequence_lengths": [32]}),
        ({"validation_paths": [held, folder / "books"]}, {"validation_paths": held}),
    ):
        data, plain = small(folder, **options), TextData(f"{folder}/*.txt", **shared, **without)
        for name in ("train_dataloader", "val_dataloader", "predict_dataloader"):
            pairs = [getattr(given, name)() for given in (data, plain)]
            pairs = [list(loader.values()) if isinstance(loader, dict) else [loader] for loader in pairs]
            for ours, theirs in zip(*pairs, strict=True):
                for first, second in zip(ours, theirs, strict=True):
                    assert {*first} == {*second} == {"tokens", "doc_ids"}
                    assert torch.equal(first["tokens"], second["tokens"])
        assert data.bytes_per_token == plain.bytes_per_token


def test_nothing_but_books_is_refused(folder: Path, cache: Path):
    books = folder / "books"
    (books / "empty.md").touch()
    with pytest.raises(ValueError, match=r"^paths holds no text but the books.*other files to paths"):
        BookStreamData(books, books=f"{books}/*.txt").prepare_data()
    with pytest.raises(ValueError, match=r"^validation_paths holds no text but the books"):
        small(folder, books=f"{books}/*.txt", validation_paths=books / "ahab.txt").setup()
    assert not cache.exists()


@pytest.mark.parametrize("text", ["", "x"])
def test_a_book_too_short_is_named(text: str, folder: Path):
    (folder / "books" / "haiku.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"haiku\.txt is too short to stream, with {len(text)} of 2 tokens"):
        small(folder).prepare_data()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_length": 0}, "chunk_length=0"),
        ({"window": 7}, r"window=7 does not hold a chunk of chunk_length=8; use window >= 8"),
        ({"num_books": 0}, "num_books=0"),
        ({"max_book_tokens": 1}, "max_book_tokens=1 leaves nothing to predict; use at least 2"),
        ({"held_out": 0}, "held_out=0"),
        ({"sequence_length": 0}, "sequence_length=0"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **options)


def test_missing_books_are_named(folder: Path):
    with pytest.raises(ValueError, match=r"^books='no.txt' does not exist"):
        small(folder, books="no.txt").prepare_data()
    with pytest.raises(ValueError, match=r"^num_books=1000000 is more than the \d+ files of the standard library"):
        small(folder, books=None, num_books=1_000_000).prepare_data()


def test_books_of_the_standard_library_are_its_longest_texts():
    longest = find_longest_files(4)
    sources = find_text_files(None)
    sizes = [file.bytes for file in longest]
    assert sizes == sorted(sizes, reverse=True)
    assert "pydoc_data/topics.py" in [file.name for file in longest]
    rest = {file.sha256: file.bytes for file in sources} | {file.sha256: file.bytes for file in longest}
    assert sizes == sorted(rest.values(), reverse=True)[:4]
    assert {folder for file in longest for folder in file.name.split("/")[:-1]} & NOT_SOURCES == {"pydoc_data"}
    assert find_longest_files(2) == longest[:2]


def test_defaults_stream_the_standard_library_and_train_on_the_rest_of_it(folder: Path):
    data = BookStreamData(max_book_tokens=3000)
    books = find_longest_files(3)
    assert data.book_names == [book.name for book in books]
    assert streamed(data.test_dataloader()) == {i: list(book.path.read_bytes()[1:3000]) for i, book in enumerate(books)}
    assert [len(data.chunks.chunks_of(i)) for i in range(3)] == [3, 3, 3]
    trained = {document.name for document in data.training_rows.cache.documents}
    assert trained == {file.name for file in find_text_files(None) if file.bytes} - {*data.book_names}


def test_bytes_of_a_trained_tokenizer(folder: Path, tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train([str(path) for path in sorted((folder / "books").iterdir())], vocab_size=290, show_progress=False)
    tokenizer.save(str(tmp_path / "bpe.json"))
    data = small(folder, tokenizer=tmp_path / "bpe.json")
    whole = [data.encode(text) for text in BOOKS.values()]
    assert streamed(data.test_dataloader()) == {i: ids[1:] for i, ids in enumerate(whole)}
    sizes = [len(text.encode()) for text in BOOKS.values()]

    def weighed(counts: list[int]) -> float:
        per_token = [size / len(ids) for size, ids in zip(sizes, whole, strict=True)]
        return sum(x * (n - 1) for x, n in zip(per_token, counts, strict=True)) / (sum(counts) - 3)

    assert data.test_bytes_per_token == pytest.approx(weighed([len(ids) for ids in whole]))
    begun = small(folder, tokenizer=tmp_path / "bpe.json", max_book_tokens=5)
    assert begun.test_bytes_per_token == pytest.approx(weighed([5, 5, 5]))
    assert begun.test_bytes_per_token > 1.1


def test_held_out_batches_are_spread_over_validation_and_the_same_each_time(folder: Path):
    data = small(folder, held_out=2)
    batches, rows = data.held_out_batches(), data.validation_rows
    count = 2 * data.batch_size
    assert len(rows) > 2 * count, "rows between those that are taken"
    for _ in range(2):
        assert len(batches) == 2
        tokens = torch.cat([batch["tokens"] for batch in batches])
        assert torch.equal(tokens, torch.stack([rows[i * len(rows) // count]["tokens"] for i in range(count)]))
    everything = small(folder, held_out=1000).held_out_batches()
    assert len(everything) == len(data.val_dataloader()) > 2
    of_a_device = on_devices(small(folder, contiguous=True), 2, 1).held_out_batches()
    assert len(next(iter(of_a_device))["tokens"]) == 4


def test_a_checkpoint_knows_what_it_has_seen(folder: Path):
    data = small(folder)
    data.setup()
    other = small(folder)
    other.setup()
    other.load_state_dict(data.state_dict())
    seen = {document.name for document in TokenCache(data.cache_dir / data._keys[0]).documents}
    book = next(iter(sorted(seen)))
    with_another = small(folder, books=[str(path) for path in folder.rglob(book)])
    with_another.setup()
    with pytest.raises(ValueError, match=rf"books: \['{book}'\] are among what the checkpoint was trained"):
        with_another.load_state_dict(data.state_dict())


def test_books_of_one_name_are_numbered(tmp_path: Path, cache: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "book.txt").write_text(f"the book {name} " * 20)
    (tmp_path / "text.txt").write_text("other words " * 200)
    books = [str(tmp_path / name / "book.txt") for name in ("a", "b")]
    data = BookStreamData(
        tmp_path / "text.txt", books=books, chunk_length=8, window=8, sequence_length=8, cache_dir=cache
    )
    data.setup()
    assert data.book_names == ["book.txt (1)", "book.txt (2)"]


def test_changed_books_are_read_again_on_the_next_run(folder: Path):
    data = small(folder)
    before = data.test_tokens
    (folder / "books" / "ahab.txt").write_text("changed")
    data.prepare_data()
    data.setup()
    assert data.test_tokens == before - len(BOOKS["ahab.txt"]) + 7


def test_arguments_are_kept_as_plain_values(folder: Path):
    data = small(folder, books=[folder / "books" / "ahab.txt"], cache_dir=folder, val_sequence_lengths=(32,))
    kept = dict(data.hparams)
    assert json.loads(json.dumps(kept)) == kept
    assert kept["books"] == [str(folder / "books" / "ahab.txt")]
    assert kept["window"] == 20


def test_the_command_line_sets_every_kind_of_argument():
    parser = ArgumentParser()
    parser.add_class_arguments(BookStreamData, "data")
    given = {"books": '["a.txt", "b/*.txt"]', "max_book_tokens": "100", "paths": "c", "held_out": "2"}
    parsed = parser.parse_args([f"--data.{name}={value}" for name, value in given.items()]).data
    assert (parsed.books, parsed.max_book_tokens, parsed.paths) == (["a.txt", "b/*.txt"], 100, "c")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_without_memory_is_tested_on_the_stream(folder: Path, tmp_path: Path):
    """The mean is over the targets, whatever the chunks' lengths, and the prefix counts for nothing."""
    data = small(folder)
    module = CausalLMModule("transformer_tiny", {"dim": 16, "depth": 1, "num_heads": 2, "hidden_dim": 16})
    trainer = quiet(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=data)
    [metrics] = trainer.test(module, datamodule=data, verbose=False)
    model, losses = module.model.eval(), []
    for batch in data.test_dataloader():
        pieces = NextTokens.of(batch)
        with torch.no_grad():
            losses.append(pieces.losses(model(pieces.inputs)[0])[pieces.counted])
    assert sum(map(len, losses)) == data.test_tokens
    assert metrics["test/loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
