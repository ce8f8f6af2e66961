"""The prompt suites keep their README's promises, and `code` can be made again."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from common.errors import UserError
from common.models.corpus import SourceFile, fingerprint, read_corpus, split_of
from common.prompts import FOLDER, load_prompts
from common.prompts.copies import copied_windows, windows
from common.prompts.make_code_prompts import TOKENIZER, cut, write_suite
from common.prompts.places import Place, find_places

KINDS = {
    "argument_parsing",
    "class_body",
    "comment",
    "data_table",
    "docstring",
    "error_handling",
    "function_body",
    "imports",
    "regular_expression",
    "unit_test",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


@pytest.fixture(scope="module")
def library() -> dict[str, str]:
    """Return path -> text of the held-out files; skip if they are not those of the suite."""
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    files = read_corpus("heldout")
    if fingerprint(files) != manifest["heldout"]:
        pytest.skip(f"the suite was cut from another library, that of Python {manifest['python']}")
    return {file.path: file.text for file in files}


def test_code_suite_has_two_halves_of_100_with_unique_ids() -> None:
    prompts = load_prompts("code")
    assert len(prompts) == len({prompt.id for prompt in prompts}) == 200
    assert len(load_prompts("code", "calibrate")) == len(load_prompts("code", "test")) == 100
    assert {prompt.half for prompt in load_prompts("code", "test")} == {"test"}


def test_halves_come_from_different_heldout_files() -> None:
    files = defaultdict(set)
    for prompt in load_prompts("code"):
        files[prompt.half].add(prompt.file)
        assert split_of(prompt.file) == "heldout"
        assert not prompt.file.startswith("encodings/")
    assert not files["calibrate"] & files["test"]
    assert all(len(paths) >= 25 for paths in files.values())


def test_every_kind_is_in_both_halves_in_like_numbers() -> None:
    numbers = Counter((prompt.kind, prompt.half) for prompt in load_prompts("code"))
    assert {kind for kind, _ in numbers} == KINDS
    for kind in KINDS:
        one, other = numbers[kind, "calibrate"], numbers[kind, "test"]
        assert min(one, other) >= 3
        assert abs(one - other) <= 3


def test_any_first_prompts_are_a_mix() -> None:
    assert len({prompt.kind for prompt in load_prompts("code")[:40]}) >= 8


def test_prompt_lengths(tokenizer: Tokenizer) -> None:
    lengths = [len(tokenizer.encode(prompt.text).ids) for prompt in load_prompts("code")]
    assert min(lengths) >= 16
    assert max(lengths) <= 200
    assert 55 <= sum(lengths) / len(lengths) <= 75
    assert sum(length > 100 for length in lengths) >= 20  # long ones are no rarity


def test_continuations_follow_without_a_seam(tokenizer: Tokenizer) -> None:
    for prompt in load_prompts("code"):
        begin, rest = tokenizer.encode(prompt.text).ids, tokenizer.encode(prompt.continuation).ids
        assert 1200 <= len(prompt.continuation) <= 1600
        assert len(rest) >= 256
        assert tokenizer.encode(prompt.text + prompt.continuation).ids == begin + rest, prompt.id


def test_no_two_prompts_share_text() -> None:
    seen: dict[str, str] = {}
    for prompt in load_prompts("code"):
        for window in set(windows(prompt.text + prompt.continuation)):
            assert window not in seen, f"{prompt.id} and {seen[window]}"
            seen[window] = prompt.id


def test_prompts_stand_in_their_files_at_a_line_start(library: dict[str, str]) -> None:
    for prompt in load_prompts("code"):
        assert "\n" + prompt.text + prompt.continuation in "\n" + library[prompt.file], prompt.id


@pytest.mark.slow
@pytest.mark.usefixtures("library")
def test_remaking_gives_the_same_bytes(tmp_path: Path) -> None:
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    if fingerprint(read_corpus("train")) != manifest["train"]:
        pytest.skip(f"the training half differs from that of Python {manifest['python']}, which says what is a copy")
    write_suite(tmp_path, manifest["seed"])
    for name in ("code.jsonl", "manifest.json"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


SAMPLE = SourceFile(
    "sample.py",
    '''import argparse
import os
import re

WORD = re.compile(r"[a-z]+")


def read(path):
    """Return the words of a file, in the order in which they stand."""
    parser = argparse.ArgumentParser(description="words")
    parser.add_argument("--path")
    try:
        handle = open(path)
        return WORD.findall(handle.read())
    except OSError:
        # nothing to read: that is no error here,
        # and no reason to stop
        return []
''',
)


def test_places_of_a_small_file() -> None:
    found: dict[str, Place] = {place.kind: place for place in reversed(find_places(SAMPLE))}
    text = SAMPLE.text
    assert set(found) == {
        "imports",
        "regular_expression",
        "docstring",
        "function_body",
        "argument_parsing",
        "error_handling",
        "comment",
    }
    for place in found.values():
        assert place.start == 0 or text[place.start - 1] == "\n"
    docstring, call = found["docstring"], found["argument_parsing"]
    assert text[docstring.start :].startswith("def read(path):")
    assert '"""Return' in text[docstring.start : docstring.earliest]  # the docstring is open ...
    assert '."""' not in text[docstring.start : docstring.latest]  # ... and stays so
    assert text[: call.earliest].endswith("argparse.ArgumentParser(")
    assert text[: found["regular_expression"].earliest].endswith("re.compile(")


def test_places_of_a_file_that_cannot_be_parsed() -> None:
    assert find_places(SourceFile("old.py", "print 'python 2'\n")) == []


def test_no_cut_without_enough_text_to_follow(tokenizer: Tokenizer) -> None:
    place = next(place for place in find_places(SAMPLE) if place.kind == "function_body")
    assert cut(place, SAMPLE.text, tokenizer, seed=0) is None
    longer = SAMPLE.text + "".join(f"\n\ndef more_{n}(value):\n    return value + {n}\n" for n in range(60))
    assert cut(place, longer, tokenizer, seed=0) is not None


def test_copies_are_found_whatever_their_indentation() -> None:
    lines = [f"self.assertEqual(self.parse({n}), expected[{n}])" for n in range(4)]
    train = SourceFile("train.py", "\n".join(lines) + "\nend()\n")
    copy = SourceFile("copy.py", "start()\n" + "\n\n".join("    " + line for line in lines))
    three = SourceFile("three.py", "\n".join(lines[:3]))
    assert copied_windows([copy], [train]) == {"\n".join(lines)}
    assert not copied_windows([three], [train])


def test_prose_covers_ten_domains() -> None:
    prompts = load_prompts("prose")
    assert len(prompts) == len({prompt.kind for prompt in prompts}) == len({prompt.id for prompt in prompts}) == 10
    for prompt in prompts:
        assert prompt.half == "test"
        assert prompt.continuation == ""
        assert len(prompt.text.split()) >= 15
        assert prompt.text == prompt.text.strip()
    assert load_prompts("prose", "calibrate") == []


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no prompt suite 'poems'; the suites are code, prose$"):
        load_prompts("poems")
    with pytest.raises(UserError, match="the halves are calibrate, test"):
        load_prompts("code", "train")  # type: ignore[arg-type]
