"""The split of the library, and the training batches."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.models.batches import Batches, Stage, encode_documents, plan_stages
from common.models.corpus import SourceFile, fingerprint, read_corpus, read_files, split_of
from common.models.train_tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer

# A change of these moves files between the halves: models would be measured on their training text.
PINNED_SPLIT = {
    "argparse.py": "train",
    "asyncio/base_events.py": "train",
    "json/decoder.py": "train",
    "test/test_dict.py": "heldout",
    "runpy.py": "heldout",
    "email/_policybase.py": "heldout",
}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_split_is_pinned() -> None:
    assert {path: split_of(path) for path in PINNED_SPLIT} == PINNED_SPLIT


def test_about_one_file_in_twenty_is_held_out() -> None:
    heldout = sum(split_of(f"package/module_{number}.py") == "heldout" for number in range(20_000))
    assert 900 <= heldout <= 1100  # 1,000 expected, standard deviation 31


def test_read_corpus_splits_by_path_and_skips_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    write(
        tmp_path,
        {
            "runpy.py": b"held = 'out'\n",
            "argparse.py": b"# -*- coding: latin-1 -*-\nname = 'caf\xe9'\n",
            "json/decoder.py": b"nested = 1\r\n",
            "not_utf8.py": b"name = '\xff\xfe'\n",
            "blank.py": b"\n\n",
            "notes.txt": b"no Python\n",
            "site-packages/argparse.py": b"somebody = 'else'\n",
        },
    )
    train, heldout = read_corpus("train", tmp_path), read_corpus("heldout", tmp_path)
    assert [file.path for file in train] == ["argparse.py", "json/decoder.py"]
    assert [file.path for file in heldout] == ["runpy.py"]
    assert "café" in train[0].text  # the coding cookie is honoured
    assert train[1].text == "nested = 1\n"


def test_read_files_names_the_file_that_is_no_text(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text("a = 1\n")
    bad.write_bytes(b"\xff\xfe")
    assert read_files([good]) == [SourceFile(good.as_posix(), "a = 1\n")]
    with pytest.raises(UserError, match=r"bad\.py cannot be read"):
        read_files([good, bad])
    with pytest.raises(UserError, match=r"absent\.py cannot be read"):
        read_files([tmp_path / "absent.py"])


def test_fingerprint_sees_texts_paths_and_borders() -> None:
    files = [SourceFile("a.py", "x"), SourceFile("b.py", "y")]
    others = [
        [SourceFile("a.py", "x"), SourceFile("b.py", "z")],
        [SourceFile("a.py", "x"), SourceFile("c.py", "y")],
        [SourceFile("a.py", "xb.py"), SourceFile("", "y")],
        files[::-1],
    ]
    assert fingerprint(files) == fingerprint(list(files)) == "bf8c2a130ec9143e"
    assert len({fingerprint(files), *map(fingerprint, others)}) == 5


def test_tokenizer_is_lossless_and_starts_with_end_of_text(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["def f(x):\n    return x\n" * 20], vocab_size=265)
    assert tokenizer.get_vocab_size() == 265
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    text = "def größe(x):\r\n\treturn '\U0001f40d' + x  "
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    save_tokenizer(tokenizer, tmp_path, context=64)
    assert (tmp_path / "tokenizer_config.json").is_file()


def test_every_document_begins_with_end_of_text() -> None:
    tokenizer = train_tokenizer(["ab"], vocab_size=260)
    stream = encode_documents(tokenizer, [SourceFile("a", "xy"), SourceFile("b", "z")]).tolist()
    x, y, z = (tokenizer.token_to_id(letter) for letter in "xyz")
    assert stream == [0, x, y, 0, z]


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        ((10, 32, 64, 0.2), [Stage(0, 8, 32), Stage(8, 2, 64)]),
        ((10, 32, 64, 1.0), [Stage(0, 10, 64)]),
        ((10, 32, 64, 0.0), [Stage(0, 9, 32), Stage(9, 1, 64)]),  # the full context is always seen
        ((10, 64, 64, 0.2), [Stage(0, 10, 64)]),
        ((1, 32, 64, 0.2), [Stage(0, 1, 64)]),
    ],
)
def test_stages_cover_all_steps(arguments: tuple[int, int, int, float], stages: list[Stage]) -> None:
    assert plan_stages(*arguments) == stages


def starts(batches: Batches, steps: range) -> list[int]:
    """Return where each window begins; the streams here count upwards, so the first token is the position."""
    return [int(row[0]) for step in steps for row in batches.at(step)]


def test_windows_of_one_epoch_do_not_overlap() -> None:
    batches = Batches(torch.arange(16 * 21), [Stage(0, 50, 16)], tokens_per_step=64, seed=3)
    epoch = sorted(starts(batches, range(5)))  # 20 windows, 4 a step
    assert len({start % 16 for start in epoch}) == 1
    assert [later - earlier for earlier, later in itertools.pairwise(epoch)] == [16] * 19
    assert sorted(starts(batches, range(5, 10))) != epoch  # another offset
    assert all(torch.equal(row, torch.arange(row[0], row[0] + 16)) for row in batches.at(7))


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    stream, stages = torch.arange(1000), [Stage(0, 30, 16), Stage(30, 10, 32)]
    forwards = Batches(stream, stages, 64, seed=1)
    backwards = Batches(stream, stages, 64, seed=1)
    there = [forwards.at(step) for step in range(40)]
    back = [backwards.at(step) for step in reversed(range(40))]
    assert all(torch.equal(a, b) for a, b in zip(there, reversed(back), strict=True))
    assert [tuple(batch.shape) for batch in (there[0], there[39])] == [(4, 16), (2, 32)]
    other = Batches(stream, stages, 64, seed=2)
    assert starts(other, range(10)) != starts(forwards, range(10))


def test_batches_are_pinned() -> None:
    """Other batches would make a resumed or retrained model differ from the documented one."""
    batches = Batches(torch.arange(1000), [Stage(0, 9, 16)], tokens_per_step=64, seed=7)
    assert starts(batches, range(1)) == [277, 341, 421, 837]
    assert starts(batches, range(8, 9)) == [21, 757, 725, 821]


def test_the_seed_of_an_epoch_is_the_same_in_every_process() -> None:
    assert hash((7, 0, 0)) == -7597901090781312627  # negative: torch takes it as two's complement
    ran = subprocess.run(
        [sys.executable, "-c", "print(hash((7, 0, 0)))"],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(ran.stdout) == hash((7, 0, 0))


def test_too_short_a_corpus_is_a_user_error() -> None:
    with pytest.raises(UserError, match="the corpus has 20 tokens; at least 32 are needed"):
        Batches(torch.arange(20), [Stage(0, 5, 16)], 64, seed=0)
