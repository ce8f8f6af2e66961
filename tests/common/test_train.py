"""The training script of the embedded models, on a tiny setting: it learns, resumes, distils, and names its errors."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError
from common.models.train import Trainer, TrainOptions, check_finite, learning_rate, main
from common.models.train_tokenizer import save_tokenizer, train_tokenizer
from common.options import parse_options

SHAPE = "--layers 2 --width 32 --heads 2 --kv-heads 1 --head-dim 16 --ffn 64 --context 64 --window 32"
COURSE = "--steps 8 --batch-tokens 256 --micro-tokens 256 --warmup 2 --lr 1e-2"
MACHINE = "--threads 1 --device cpu --no-bf16 --no-compile"
TINY = f"{SHAPE} {COURSE} {MACHINE}".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the options that name a tokenizer and a corpus of two files."""
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


def rows_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def train(out: Path, data: list[str], *options: str) -> list[float]:
    """Run the script (later options win); return the loss of every step, checked to be logged once and in order."""
    assert main([*TINY, *data, "--out", str(out), *options]) == 0
    rows = rows_of(out)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> Path:
    """Make a run of eight steps, never interrupted."""
    out = tmp_path_factory.mktemp("finished")
    train(out, data)
    return out


@pytest.fixture(scope="module")
def losses(finished: Path) -> list[float]:
    return [row["loss"] for row in rows_of(finished)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> Path:
    """Return the model folder of a run long enough to learn something."""
    out = tmp_path_factory.mktemp("teacher")
    train(out, data, "--steps", "60", "--eval-every", "20")
    return out / "model"


def test_loss_falls_on_text_seen_and_unseen(teacher: Path) -> None:
    rows = rows_of(teacher.parent)
    assert rows[0]["loss"] > 5  # about ln(320) before anything is learnt
    assert rows[-1]["loss"] < 2
    heldout = [row["heldout_loss"] for row in rows if "heldout_loss" in row]
    assert [row["step"] for row in rows if "heldout_loss" in row] == [19, 39, 59]
    assert heldout == sorted(heldout, reverse=True)
    assert heldout[-1] < 2


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
def test_bfloat16_learns_too(tmp_path: Path, data: list[str], device: str) -> None:
    found = train(tmp_path, data, "--bf16", "--steps", "15", "--device", device)
    assert found[-1] < 0.7 * found[0]


def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, data: list[str], finished: Path, losses: list[float]
) -> None:
    assert len(train(tmp_path, data, "--stop-after", "3")) == 3
    assert not (tmp_path / "model").exists()
    with (tmp_path / "log.jsonl").open("a") as log:  # a step that was logged but not saved when the run was killed
        log.write('{"step": 3, "loss": 99.0}\n{"step": 4, "lo')  # and one that was cut off
    with pytest.raises(UserError, match=r"holds a run with --lr 0\.01, not 0\.02"):
        train(tmp_path, data, "--lr", "0.02")
    assert train(tmp_path, data) == pytest.approx(losses, rel=1e-5)
    with (
        safe_open(finished / "model/model.safetensors", "pt") as whole,
        safe_open(tmp_path / "model/model.safetensors", "pt") as resumed,
    ):
        for name in whole.keys():  # noqa: SIM118 (not a dictionary)
            torch.testing.assert_close(resumed.get_tensor(name), whole.get_tensor(name), rtol=1e-3, atol=1e-3)


def test_checkpoints_come_as_often_as_asked(tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(Trainer, "save", lambda trainer: saved.append(trainer.step))
    train(tmp_path, data, "--save-every", "3")
    assert saved == [3, 6, 8]  # and at the end


def test_accumulation_changes_nothing(tmp_path: Path, data: list[str], losses: list[float]) -> None:
    # 96 tokens are three rows of the short window and one of the full: eight rows split unevenly
    assert train(tmp_path, data, "--micro-tokens", "96") == pytest.approx(losses, rel=2e-3)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, data: list[str], losses: list[float]) -> None:
    options = [*TINY, *data, "--out", str(tmp_path), "--checkpointing"]
    trainer = Trainer(parse_options(TrainOptions, options, "train.py"))
    calls: list[int] = []
    attention = trainer.model.get_submodule("model.layers.0.self_attn")
    attention.register_forward_pre_hook(lambda *_: calls.append(trainer.step))
    assert [trainer.train_step() for _ in range(8)] == pytest.approx(losses, rel=1e-4)
    assert calls == [step for step in range(8) for _ in ("forward", "again, for the backward")]


def test_distillation_lowers_the_distance_to_the_teacher(tmp_path: Path, data: list[str], teacher: Path) -> None:
    found = train(tmp_path, data, "--teacher", str(teacher), "--layers", "1", "--steps", "40", "--tv-share", "1")
    assert all(0 <= distance <= 1 for distance in found)
    assert found[0] > 0.8
    assert found[-1] < 0.6


def test_distillation_turns_from_kl_to_tv(tmp_path: Path, data: list[str], teacher: Path) -> None:
    found = train(tmp_path, data, "--teacher", str(teacher), "--steps", "8", "--tv-share", "0.25")
    assert min(found[:6]) > 1  # nats
    assert max(found[6:]) < 1  # a distance


def test_a_model_is_at_no_distance_from_itself(tmp_path: Path, data: list[str], teacher: Path) -> None:
    options = parse_options(TrainOptions, [*TINY, *data, "--out", str(tmp_path), "--teacher", str(teacher)], "train.py")
    trainer = Trainer(options)
    trainer.model.load_state_dict(AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).state_dict())
    tokens = trainer.batches.at(0)
    assert trainer.loss(tokens, True).item() == pytest.approx(0, abs=1e-5)
    trainer.loss(tokens, False).backward()  # the KL term is at its minimum: no gradient
    assert max(float(p.grad.abs().max()) for p in trainer.model.parameters() if p.grad is not None) < 1e-5


def test_the_exported_folder_loads_as_any_checkpoint(teacher: Path) -> None:
    with safe_open(teacher / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    generation = json.loads((teacher / "generation_config.json").read_text())
    assert generation["eos_token_id"] == generation["bos_token_id"] == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
    assert model.dtype == torch.float16
    assert model.config.use_cache
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0
    ids = tokenizer("def function_7(", return_tensors="pt").input_ids
    written = tokenizer.decode(model.float().generate(ids, do_sample=False, max_new_tokens=8)[0].tolist())
    assert str(written).startswith("def function_7(left, right):\n    ")


@pytest.mark.parametrize("poisoned", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_loss_that_is_no_number_names_the_tensor(tmp_path: Path, data: list[str], poisoned: str) -> None:
    trainer = Trainer(parse_options(TrainOptions, [*TINY, *data, "--out", str(tmp_path)], "train.py"))
    with torch.no_grad():
        trainer.model.get_parameter(poisoned)[0, 0] = torch.nan
    before = trainer.model.get_parameter("model.norm.weight").clone()
    with pytest.raises(UserError, match=rf"the loss at step 0 is nan: the weights of {poisoned} are not finite"):
        trainer.run()
    assert torch.equal(trainer.model.get_parameter("model.norm.weight"), before)  # nothing was learnt from it
    assert not trainer.checkpoint.exists()


def test_bad_gradients_and_overflow_are_told_apart(tmp_path: Path, data: list[str]) -> None:
    model = Trainer(parse_options(TrainOptions, [*TINY, *data, "--out", str(tmp_path)], "train.py")).model
    check_finite(1.5, model, step=4)
    with pytest.raises(UserError, match="step 4 is inf with finite weights"):
        check_finite(float("inf"), model, step=4)
    weight = model.get_parameter("model.norm.weight")
    weight.grad = torch.full_like(weight, torch.inf)
    with pytest.raises(UserError, match=r"the gradient of model\.norm\.weight is not finite"):
        check_finite(float("nan"), model, step=4)


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    options = TrainOptions(out=Path("out"), steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(step, options) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(1 / 90)


def test_bad_input_is_a_user_error(tmp_path: Path, data: list[str]) -> None:
    empty, short = tmp_path / "empty.py", tmp_path / "short.py"
    empty.write_text("")
    short.write_text("pass\n")
    tokenizer = data[:2]
    base = [*TINY, "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="the corpus has 1 tokens; at least 128 are needed"):
        main([*base, *tokenizer, "--corpus", str(empty)])
    with pytest.raises(UserError, match="the held-out text is shorter than one context of 64 tokens"):
        main([*base, *data, "--corpus", str(short)])
    with pytest.raises(UserError, match=r"absent\.py cannot be read"):
        main([*base, *tokenizer, "--corpus", str(tmp_path / "absent.py")])
    with pytest.raises(UserError, match=r"--tokenizer: no tokenizer\.json in"):
        main([*base, *data, "--tokenizer", str(tmp_path)])
