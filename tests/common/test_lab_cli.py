"""The `lab` command: its help, its errors, and the findings of doctor and pull."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from common.errors import UserError
from common.lab import doctor
from common.lab.cli import COMMANDS, entry, main


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the console script in this process; return exit status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lab", *arguments])
        with pytest.raises(SystemExit) as exit_:
            entry()
        return int(exit_.value.code or 0), *capsys.readouterr()

    return run


def _small_llama(folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


def test_help_lists_every_command(lab: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = lab("--help")
    assert status == 0
    for name, (_, text) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", out, re.MULTILINE)


def test_each_command_has_its_own_help(lab: Callable[..., tuple[int, str, str]]) -> None:
    for name in ("doctor", "pull"):
        status, out, _ = lab(name, "--help")
        assert status == 0
        assert out.startswith(f"usage: lab {name}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["docter"], "unknown command 'docter'; the commands are demo, doctor, pull"),
        ([], "COMMAND"),
        (["--fast"], "--fast|COMMAND"),
        (["doctor", "--fast"], "--fast"),
        (["demo", "--rounds", "0"], "--rounds start at 1"),
        (["demo", "--prompts", "0"], "--prompts, --max-tokens and --rounds start at 1"),
        (["pull"], "NAME"),
        (["pull", "no-such-folder/really/not"], "no-such-folder/really/not"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    lab: Callable[..., tuple[int, str, str]], arguments: list[str], message: str
) -> None:
    status, out, err = lab(*arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert re.search(message, err)


def test_pull_reports_what_a_checkpoint_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _small_llama(tmp_path)
    assert main(["pull", str(tmp_path)]) == 0
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert lines["folder"] == str(tmp_path)
    assert lines["architecture"] == "LlamaForCausalLM (model type llama)"
    assert lines["parameters"].startswith(f"{parameters:,} ")
    assert lines["tensors"] == f"{len(list(model.parameters()))}, all readable and finite"
    assert lines["stored as"].startswith("float32, ")


def test_pull_counts_neither_masks_nor_tied_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 in the hub's old format: a causal mask per layer and a second name for the embedding."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    model.config.save_pretrained(tmp_path)
    weights = {name.removeprefix("transformer."): tensor for name, tensor in model.transformer.state_dict().items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    weights["lm_head.weight"] = model.transformer.wte.weight.detach()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert main(["pull", str(tmp_path)]) == 0
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert f"parameters    {expected:,} " in capsys.readouterr().out


def test_pull_names_the_tensor_that_is_not_finite(tmp_path: Path) -> None:
    model = _small_llama(tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds 3 values"):
        main(["pull", str(tmp_path)])


def test_pull_refuses_a_truncated_file(tmp_path: Path) -> None:
    _small_llama(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        main(["pull", str(tmp_path)])


def test_doctor_prints_a_table_and_the_same_as_json(lab: Callable[..., tuple[int, str, str]]) -> None:
    status, table, _ = lab("doctor")
    assert status == 0
    status, out, _ = lab("doctor", "--json")
    assert status == 0
    findings = {finding["name"]: finding for finding in json.loads(out)["findings"]}
    assert findings["Python"]["found"].startswith(".".join(map(str, sys.version_info[:3])))
    assert findings["torch"]["found"].startswith(torch.__version__)
    assert {"device cpu", "cores", "C++ compiler", "nvcc", "triton", "llama-cpp-python"} <= set(findings)
    for name, finding in findings.items():
        row = next(line for line in table.splitlines() if line.startswith(f"| {name} "))
        assert (finding["found"] or "would enable") in row
        assert finding["enables"] in row


def test_doctor_says_what_a_missing_compiler_would_enable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lab: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    _, table, _ = lab("doctor")
    assert re.search(r"\| C\+\+ compiler +\| missing +\| would enable: the C\+\+ kernels", table)
    assert re.search(r"\| nvcc +\| missing +\| would enable: the CUDA kernels", table)


def test_doctor_quotes_a_program_that_runs_and_skips_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, text in (("broken", "exit 1"), ("works", "echo 'my c++ 14.2 (x)'; echo more")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "broken"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (tmp_path / "works").rename(tmp_path / "c++")
    found = {finding.name: finding.found for finding in doctor.examine()}
    assert found["C++ compiler"] == f"{tmp_path / 'c++'} (my c++ 14.2 (x))"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 fma\n\nprocessor : 1\nflags\t\t: fpu avx2 fma\n", {"fpu", "avx2", "fma"}),
        ("Features\t: fp asimd bf16\nCPU part : 0xd0c\n", {"fp", "asimd", "bf16", "neon"}),
        ("FPU SSE\nAVX2 BMI1", {"fpu", "sse", "avx2", "bmi1"}),
    ],
)
def test_instruction_sets_as_linux_and_macos_write_them(text: str, expected: set[str]) -> None:
    assert doctor.parse_instruction_sets(text) == expected
