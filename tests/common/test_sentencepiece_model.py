"""Folders with only a tokenizer.model: ids and texts equal those of the sentencepiece library itself."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import common.sentencepiece_model
from common.errors import UserError
from common.tokenizer import IncrementalDecoder, Tokenizer

LLAMA = {  # the flags of Llama 2 and Mistral
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "unigram": {**LLAMA, "model_type": "unigram"},
    "no prefix": {**LLAMA, "add_dummy_prefix": False},
    "normalised": {"model_type": "bpe"},  # sentencepiece's own: NFKC, spaces merged
}
TEXTS = [
    "", " ", "a", " a", "  a  b ", "import os\n\n\n    return  self.x[10:25]", "naïve café, 東京 and 😀😀 👩‍🚀",
    "\ta\r\nb", "the quick brown fox", "ﬁ ½ ™ \uff21", "\u3000wide\u00a0space", "▁spelled ▁ so", "<unknown> < s >",
    "0xFF 1234567890",
]  # fmt: skip


def train(folder: Path, **flags: Any) -> Path:
    """Make a tokenizer.model in an otherwise empty folder."""
    source = Path(common.sentencepiece_model.__file__).read_text(encoding="utf-8")
    (folder / "text").write_text(source + "\n".join(TEXTS) * 3, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=480, byte_fallback=True,
        character_coverage=0.99, hard_vocab_limit=False, num_threads=1, minloglevel=2, **flags,
    )  # fmt: skip
    for name in ("text", "tokenizer.vocab"):
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained"), **KINDS[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("llama"), **LLAMA, user_defined_symbols=["<tool>"])


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Tokenizer, Any]:
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return Tokenizer.load(folder, {}, {}), library


@given(text=st.sampled_from(TEXTS) | st.text(max_size=12) | st.text(alphabet="abc eé\n0 .▁", max_size=30))
@settings(max_examples=150)
def test_the_ids_and_texts_of_the_library(both: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, library = both
    if "\0" in text:
        return  # the library reads texts up to the first 0
    ids = tokenizer.encode(text)
    assert ids == [library.bos_id(), *library.encode(text)]
    assert tokenizer.decode(ids) == library.decode(ids)
    decoder = IncrementalDecoder(tokenizer)
    assert "".join([*map(decoder.push, ids), decoder.flush()]) == library.decode(ids)


def test_the_vocabulary_and_its_ends(both: tuple[Tokenizer, Any]) -> None:
    tokenizer, library = both
    assert [tokenizer.piece(number) for number in range(len(library))] == [
        library.id_to_piece(number) for number in range(len(library))
    ]
    assert tokenizer.vocab_size == len(library)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (library.bos_id(), (library.eos_id(),))
    assert tokenizer.special_ids == {library.unk_id(), library.bos_id(), library.eos_id()}


def test_flags_and_added_tokens_beside_the_model(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((llama / "tokenizer.model").read_bytes())
    size = Tokenizer.load(tmp_path, {}, {}).vocab_size
    plain = Tokenizer.load(tmp_path, {}, {}).encode("import os")
    tool = Tokenizer.load(tmp_path, {}, {}).encode("<tool>")[-1]

    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    about: dict[str, Any] = {
        "add_bos_token": False,
        "add_eos_token": True,
        "eos_token": "<|end|>",
        "added_tokens_decoder": {
            str(size + 1): {"content": "<|end|>"},
            str(tool): {"content": "<call>", "special": False},
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    tokenizer = Tokenizer.load(tmp_path, {}, {})
    assert tokenizer.encode("import os") == [*plain[1:], size + 1]
    assert tokenizer.encode("<pad><|end|>")[:-1] == [size, size + 1]
    assert tokenizer.encode("<call>")[0] == tool
    assert tokenizer.eos_ids == (size + 1,)
    assert tokenizer.decode([size, tool]) == "<call>"

    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": size + 5}))
    with pytest.raises(UserError, match=r"added token '.+' should have the id \d+, and the next that is free is \d+"):
        Tokenizer.load(tmp_path, {}, {})
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": "five"}))
    with pytest.raises(UserError, match=r"added_tokens.json: <pad> should be a valid integer"):
        Tokenizer.load(tmp_path, {}, {})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"model_type": "char"}, "models of words or of characters are not supported"),
        ({**LLAMA, "treat_whitespace_as_suffix": True}, "spaces are not written before words"),
    ],
)
def test_what_cannot_be_converted(tmp_path: Path, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Tokenizer.load(train(tmp_path, **flags), {}, {})


def test_a_damaged_model_is_refused_or_read(llama: Path, tmp_path: Path) -> None:
    """Changed bytes of a protocol buffer may still be a valid one."""
    whole, random = (llama / "tokenizer.model").read_bytes(), Random(0)
    contents = [b"", b"\xff" * 100, b"{}", b"IQ== 0\nIg== 1\n", whole[:1000], whole[5:]]
    for _ in range(60):
        spoilt = bytearray(whole)
        for _ in range(4):
            spoilt[random.randrange(len(spoilt))] = random.randrange(256)
        contents.append(bytes(spoilt))
    errors: list[str] = []
    for content in contents:
        (tmp_path / "tokenizer.model").write_bytes(content)
        try:
            Tokenizer.load(tmp_path, {}, {}).encode("import os")
        except UserError as error:
            errors.append(str(error))
    assert len(errors) >= 6
    assert all(str(tmp_path) in error or "cannot encode" in error for error in errors)
