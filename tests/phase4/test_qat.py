"""Quantisation-aware training: it rounds as the engine does, learns through rounding, and continues from a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModelForCausalLM

import phase4
from common.errors import UserError
from common.models.qat import StraightThrough, matrices, round_to_int4
from common.models.train import Trainer, TrainOptions, main
from common.models.train_tokenizer import save_tokenizer, train_tokenizer
from common.options import parse_options
from phase4.quantize import Format, QuantLinear, rtn

CPU = torch.device("cpu")
SHAPE = "--layers 1 --width 64 --heads 2 --kv-heads 1 --head-dim 32 --ffn 64 --context 64 --window 32"
COURSE = "--steps 20 --batch-tokens 256 --micro-tokens 256 --warmup 2 --lr 1e-2 --eval-every 5"
TINY = f"{SHAPE} {COURSE} --threads 1 --device cpu --no-bf16 --no-compile".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    bodies = ("return left + right", "return left * right", "if left:\n        return right\n    raise KeyError(left)")
    functions = [f"def function_{n}(left, right):\n    {bodies[n * n % 3]}\n\n\n" for n in range(240)]
    texts = ["".join(functions[:200]), "".join(functions[200:])]
    save_tokenizer(train_tokenizer(texts[:1], vocab_size=320), folder, context=64)
    options = ["--tokenizer", str(folder)]
    for number, text in enumerate(texts):
        (folder / f"part{number}.py").write_text(text)
        options += ["--corpus", str(folder / f"part{number}.py")]
    return options


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert main([*TINY, *data, "--out", str(out)]) == 0
    return out / "model"


def trainer(out: Path, data: list[str], *options: str) -> Trainer:
    return Trainer(parse_options(TrainOptions, [*TINY, *data, "--out", str(out), *options], "train.py"))


@given(st.integers(0, 2**31), st.floats(-8, 3))
def test_training_rounds_as_the_engine_does(seed: int, size: float) -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(seed)) * 10**size
    weight[0, :64] = 0
    format = Format("int4", 64)
    assert torch.equal(round_to_int4(weight), QuantLinear.of(rtn(weight, format), format, None).weight)


def test_the_gradient_passes_the_rounding() -> None:
    weight, x = torch.randn(4, 64, requires_grad=True), torch.randn(3, 64)
    rounded = StraightThrough()(weight)
    torch.testing.assert_close(rounded, round_to_int4(weight))
    (x @ rounded.T).square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * (x @ round_to_int4(weight.detach()).T).T @ x)


def test_it_goes_on_from_a_model_and_makes_its_rounding_cheaper(tmp_path: Path, data: list[str], trained: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    plain = trainer(tmp_path / "plain", data, "--init", str(trained))
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name))
    tuned = trainer(tmp_path / "tuned", data, "--init", str(trained), "--qat", "int4", "--lr", "3e-3")
    for (_, linear), (_, before) in zip(matrices(tuned.model), matrices(expected), strict=True):
        torch.testing.assert_close(linear.weight, round_to_int4(before.weight))
    rounded = tuned.heldout_loss()
    assert rounded != plain.heldout_loss()  # may be below 1: for a model of 20 steps rounding can help by chance
    tuned.run()
    assert tuned.heldout_loss() < rounded
    engine = phase4.load(str(tmp_path / "tuned/model"), torch.float32, CPU, Format("int4", 64)).model
    logits = engine(tuned.heldout[:, :-1]).flatten(0, 1)
    assert float(functional.cross_entropy(logits, tuned.heldout[:, 1:].flatten())) < rounded
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned/model", dtype=torch.float32)
    for _, linear in matrices(saved):  # the checkpoint holds the weights before rounding
        assert not torch.allclose(linear.weight, round_to_int4(linear.weight), atol=1e-4)


def test_bad_input_is_a_user_error(tmp_path: Path, data: list[str], trained: Path) -> None:
    with pytest.raises(UserError, match=r"--qat int4: layers\.0\.self_attn\.q_proj has 32 inputs, no multiple of 64"):
        trainer(tmp_path, data, "--qat", "int4", "--width", "32")
    with pytest.raises(UserError, match="--init stdlib-1m has 4096 tokens, --tokenizer 320: give its own"):
        trainer(tmp_path, data, "--init", "stdlib-1m")
    with pytest.raises(UserError, match="sees 64 tokens; give --context at most that"):
        trainer(tmp_path, data, "--init", str(trained), "--context", "128")
