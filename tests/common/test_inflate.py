"""An enlarged checkpoint computes the same function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.checkpoint import MODELS
from common.errors import UserError
from common.models.inflate import inflate, main
from phase5 import load


def logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = load(str(folder), torch.float32, torch.device("cpu")).model
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([tokens]))[0]
        return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [2, 3, 5])
def test_the_function_stays(layers: int, tied: bool, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    small = make_checkpoint("llama", tie_word_embeddings=tied, dtype="float16")
    tokens = torch.randint(0, 320, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    before = logits(small, tokens)
    parameters = inflate(small, tmp_path / "large", layers, 96, 128)
    after = logits(tmp_path / "large", tokens)
    # Matrices are stored in float16; those of this small model are float32, and lose precision.
    torch.testing.assert_close(after, before, rtol=0, atol=5e-3 * float(before.abs().max()))
    model = load(str(tmp_path / "large"), torch.float32, torch.device("cpu")).model
    assert model.config.layers == layers
    assert model.config.width == 96
    assert parameters > 2 * sum(
        p.numel() for p in load(str(small), torch.float32, torch.device("cpu")).model.parameters()
    )


def test_the_embedded_model_is_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """stdlib-10m's matrices are float16 already: only the order of sums differs. 8 layers of 768."""
    out = tmp_path / "large"
    main(["--model", "stdlib-10m", "--out", str(out), "--layers", "8", "--width", "768", "--ffn-width", "1024"])
    assert "the function of stdlib-10m" in capsys.readouterr().out
    tokens = torch.randint(1, 4096, (48,), generator=torch.Generator().manual_seed(2)).tolist()
    difference = (logits(out, tokens) - logits(MODELS / "stdlib-10m", tokens)).abs().max()
    assert float(difference) < 1e-4


def test_what_cannot_be_inflated(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only Llama checkpoints"):
        inflate(make_checkpoint("gpt2"), tmp_path / "a", 4, 96, 128)
    small = make_checkpoint("llama")
    with pytest.raises(UserError, match="hidden_size must not shrink: the model has 48, and 40"):
        inflate(small, tmp_path / "b", 4, 40, 128)
