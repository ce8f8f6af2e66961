"""Small files of a checkpoint: their valid contents, and one line for every fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

import common.companions
from common.companions import companion
from common.errors import UserError
from common.files import MOST_BYTES, read_checked, read_json, shown


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    assert str(UserError("a\nb\x1b[31m\ud800 é ▁")) == "a\\nb\\x1b[31m\\ud800 é ▁"


def test_values_are_shown_short() -> None:
    nested: Any = []
    for _ in range(500):
        nested = [nested]
    for value in ("x" * 10_000, 10**3000, list(range(10_000)), {str(i): i for i in range(1000)}, nested):
        assert len(shown(value)) < 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": ' * 100_000, "nested too deep"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "expected a JSON object, got a list"),
    ],
)
def test_what_is_no_json_object(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(UserError, match=f"file.json: .*{words}"):
        read_json(tmp_path / "file.json")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "file.json").open("wb") as file:
        file.truncate(MOST_BYTES * 1000)
    with pytest.raises(UserError, match=f"expected a JSON file of at most {MOST_BYTES}"):
        read_json(tmp_path / "file.json")


class Kind(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    size: Annotated[int, Field(ge=1)]
    inner: dict[str, list[int]] = {}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "file.json: lacks the key 'size'"),
        ({"size": 0}, "file.json: size should be greater than or equal to 1, got 0"),
        ({"size": "1"}, "file.json: size should be a valid integer, got '1'"),
        ({"size": 1, "colour": 2}, "file.json: has the unknown key 'colour'"),
        ({"size": 1, "inner": {"a": [1, None]}}, "file.json: inner.a.1 should be a valid integer, got None"),
    ],
)
def test_a_wrong_value_is_named_by_file_and_key(tmp_path: Path, document: dict[str, Any], words: str) -> None:
    (tmp_path / "file.json").write_text(json.dumps(document))
    with pytest.raises(UserError) as error:
        read_checked(tmp_path / "file.json", TypeAdapter(Kind))
    assert str(error.value) == f"{tmp_path}/{words}"


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a target's folder, with one model inside and one beside it, an embedded model and embedded heads."""
    for place in ("models/tiny", "target", "target/small", "beside"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text("{}")
    (tmp_path / "models" / "tiny-heads").mkdir()
    (tmp_path / "models" / "tiny-heads" / "heads.json").write_text("{}")
    (tmp_path / "target" / "link").symlink_to(tmp_path / "beside")
    monkeypatch.setattr(common.companions, "MODELS", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "target"


def test_companions_are_embedded_or_inside_the_folder(target: Path) -> None:
    assert companion(target, "draft") is None
    (target / "lab.json").write_text('{"draft": "tiny", "eagle": "tiny-heads"}')
    assert companion(target, "draft") == "tiny"
    assert companion(target, "eagle") == "tiny-heads"
    assert companion(target, "medusa") is None
    for name in ("small", "./small", "small/../small"):
        (target / "lab.json").write_text(json.dumps({"draft": name}))
        assert companion(target, "draft") == str(target / "small")


@pytest.mark.parametrize(
    "name",
    [
        "../beside",
        "beside",
        "link",
        "small/../../beside",
        "tiny-heads",
        "owner/name",
        "~",
        "/etc",
        "lab.json",
        "a" * 200,
    ],
)
def test_companions_are_nowhere_else(target: Path, name: str) -> None:
    for place in (name, str(target.parent / "beside")):
        (target / "lab.json").write_text(json.dumps({"draft": place}))
        with pytest.raises(UserError, match=r"draft of .*lab.json should be an embedded model or a folder inside"):
            companion(target, "draft")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"draft": 5}, "draft should be a valid string"),
        ({"draft": ""}, "draft should have at least 1 character"),
        ({"draft": "a\0b"}, "draft should match pattern"),
        ({"draft": "a" * 300}, "draft should have at most 200 characters"),
        ({"draft": "\ud800"}, "not valid JSON"),
        ({"drafts": "tiny"}, "has the unknown key 'drafts'"),
    ],
)
def test_what_lab_json_cannot_say(target: Path, document: dict[str, Any], words: str) -> None:
    (target / "lab.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=f"lab.json: {words}"):
        companion(target, "draft")
