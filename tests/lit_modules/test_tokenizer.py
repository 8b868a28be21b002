import sys
from pathlib import Path

import numpy as np
import pytest

from memzoo.lit_modules.data.tokenizer import load_tokenizer


@pytest.fixture
def words(tmp_path: Path) -> str:
    """A tokenizer of three words whose file asks for truncation, padding and a leading special token."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<s>": 0, "?": 1, "to": 2, "be": 3, "or": 300}, unk_token="?")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def test_bytes_round_trip_and_survive_broken_characters():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode(tokenizer.encode("naïve ☃\n")) == "naïve ☃\n"
    assert tokenizer.decode([0x61, 0xC3]) == "a\N{REPLACEMENT CHARACTER}"
    (piece,) = tokenizer.encode_pieces(["é".encode()])
    assert piece.dtype == np.uint8
    assert piece.tolist() == [0xC3, 0xA9]


def test_file_tokenizer_gives_all_ids_and_only_those(words: str):
    tokenizer = load_tokenizer(words)
    assert tokenizer.vocab_size == 301  # ids may have gaps
    assert tokenizer.encode("to be or xx be") == [2, 3, 300, 1, 3]
    assert tokenizer.decode(np.array([2, 3, 300])) == "to be or"
    pieces = tokenizer.encode_pieces([b"to be or", b"", b"be"])
    assert [piece.tolist() for piece in pieces] == [[2, 3, 300], [], [3]]
    assert all(piece.dtype == np.uint16 for piece in pieces)


def test_fingerprint_follows_the_file(words: str):
    before = load_tokenizer(words).fingerprint
    Path(words).write_text(Path(words).read_text().replace('"or"', '"not"'))
    assert load_tokenizer(words).fingerprint != before


def test_bad_tokenizers_are_named(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"tokenizer='byte' is no file; pass 'bytes' or"):
        load_tokenizer("byte")
    for content in (b'{"no": "tokenizer"}', b"\xff\xfe"):
        (tmp_path / "other.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"other\.json' is not a tokenizer file"):
            load_tokenizer(str(tmp_path / "other.json"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'memzoo\[data\]'"):
        load_tokenizer(words)
