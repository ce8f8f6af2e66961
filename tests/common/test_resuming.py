"""Checkpoints and logs of training runs: refusals, and the state that an interrupted run leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.models.resuming import keep_log, read_checkpoint, write_checkpoint

CPU = torch.device("cpu")
OPTIONS = {"lr": 0.01, "tv_share": 0.5}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint.pt", {"weights": torch.arange(4096.0), "options": OPTIONS, "step": 3})
    return tmp_path / "checkpoint.pt"


def test_a_checkpoint_is_read_as_it_was_written(checkpoint: Path) -> None:
    state = read_checkpoint(checkpoint, OPTIONS, CPU)
    assert state is not None
    assert torch.equal(state["weights"], torch.arange(4096.0))
    assert state["step"] == 3
    assert [file.name for file in checkpoint.parent.iterdir()] == ["checkpoint.pt"]
    assert read_checkpoint(checkpoint.with_name("none.pt"), OPTIONS, CPU) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**OPTIONS, "lr": 0.02}, r"holds a run with --lr 0\.01, not 0\.02; give it, or another --out"),
        ({"lr": 0.01}, r"holds a run with --tv-share 0\.5, not None"),
        ({**OPTIONS, "teacher": "x"}, r"holds a run with --teacher None, not x"),
    ],
)
def test_other_options_are_refused(checkpoint: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_checkpoint(checkpoint, options, CPU)


@pytest.mark.parametrize("kept", [0, 100, 0.5, -1])
def test_a_truncated_checkpoint_is_refused(checkpoint: Path, kept: float) -> None:
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=r"checkpoint\.pt: not a whole checkpoint") as caught:
        read_checkpoint(checkpoint, OPTIONS, CPU)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_something_else_is_refused(checkpoint: Path) -> None:
    torch.save([1, 2], checkpoint)
    with pytest.raises(UserError, match="not a whole checkpoint"):
        read_checkpoint(checkpoint, OPTIONS, CPU)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line_and_keeps_the_old_checkpoint(checkpoint: Path) -> None:
    checkpoint.with_suffix(".part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"checkpoint\.pt: cannot be written .*disk full") as caught:
        write_checkpoint(checkpoint, {"weights": torch.zeros(2**18), "options": OPTIONS, "step": 4})
    assert "\n" not in str(caught.value)
    state = read_checkpoint(checkpoint, OPTIONS, CPU)
    assert state is not None
    assert state["step"] == 3


def test_a_log_keeps_what_is_before_the_step(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    keep_log(log, 2)  # none yet
    assert not log.exists()
    whole = ['{"step": 0, "loss": 3.5}', '{"step": 1, "loss": 3.25}', '{"step": 2, "loss": 3.0}']
    for last in ("", '{"step": 3, "lo', '{"step": 3}\n{"st', "null"):
        log.write_text("\n".join([*whole, last]))
        keep_log(log, 2)
        assert log.read_text() == "\n".join(whole[:2]) + "\n"
    keep_log(log, 0)
    assert log.read_text() == ""


def test_a_broken_line_within_a_log_is_an_error(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"log\.jsonl, line 2: expected an object with a step"):
        keep_log(log, 3)
