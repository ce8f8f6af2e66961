"""The command line of every phase: its output, and its errors for wrong input."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.flags import most_threads
from common.phases import Phase

Run = Callable[..., tuple[int, str, str]]


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    status, out, err = result
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, f"one line, not {err!r}"
    for word in words:
        assert word in err, err


def test_text_goes_to_stdout_and_one_line_to_stderr(run: Run, llama_folder: Path) -> None:
    status, out, err = run("--model", llama_folder, "--prompt", "import", "--max-tokens", 5)
    assert status == 0
    assert out.endswith("\n")
    assert err.count("\n") == 1
    assert "5 tokens" in err
    assert "float32" in err


def test_a_prompt_that_ends_in_white_space_is_noted(run: Run) -> None:
    def notes(*prompts: str) -> list[str]:
        given = [word for prompt in prompts for word in ("--prompt", prompt)]
        err = run("--model", "stdlib-1m", "--max-tokens", 1, *given)[2]
        return [line for line in err.splitlines() if "white space" in line]

    assert notes("import", "def f(self):\n") == []
    (note,) = notes("import", "import ", "def f(self):\n    ")
    assert note.startswith("note: a prompt ends in white space")


def test_json_document(run: Run, llama_folder: Path, phase: Phase) -> None:
    status, out, _ = run(
        "--model", llama_folder, "--prompt", "import ", "--prompt", "a, b", "--max-tokens", 4, "--json"
    )
    document = json.loads(out)
    assert status == 0
    assert document["phase"] == phase.number
    assert document["settings"]["prompt"] == ["import ", "a, b"]
    assert document["settings"]["max_tokens"] == 4
    for completion in document["completions"]:
        assert len(completion["tokens"]) == 4
        assert completion["finish_reason"] == "length"
        stats = completion["stats"]
        assert stats["new_tokens"] == 4
        assert 0 < stats["ttft_ms"] <= stats["total_ms"]
        assert stats["target_forwards"] >= 1


def test_the_same_seed_gives_the_same_text(run: Run, llama_folder: Path) -> None:
    def sample(seed: int) -> str:
        return run("--model", llama_folder, "--prompt", "x", "--temperature", 1, "--seed", seed, "--max-tokens", 12)[1]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_several_completions_are_headed(run: Run, llama_folder: Path) -> None:
    _, out, _ = run("--model", llama_folder, "--prompt", "x", "--n", 3, "--temperature", 1, "--max-tokens", 3)
    assert [line for line in out.splitlines() if line.startswith("---")] == [
        f"--- completion {i} ---" for i in (1, 2, 3)
    ]


def test_prompt_from_stdin_and_file(
    run: Run, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("def f(")
    direct = run("--model", llama_folder, "--prompt", "def f(")
    assert run("--model", llama_folder, "--prompt-file", file)[1] == direct[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("def f("))
    assert run("--model", llama_folder)[1] == direct[1]


def test_precedence_flag_environment_file_default(
    cli: ModuleType, phase: Phase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from common.options import parse_options

    options = importlib.import_module(f"{phase.package}.options").Options
    file = tmp_path / "c.yaml"
    file.write_text("max-tokens: 7\ntop_k: 5\nseed: 3\n")
    monkeypatch.setenv("SPECDEC_TOP_K", "6")
    monkeypatch.setenv("SPECDEC_SEED", "4")
    got = parse_options(options, ["--config", str(file), "--seed", "9"], program="generate.py")
    assert (got.max_tokens, got.top_k, got.seed, got.top_p) == (7, 6, 9, 1.0)
    monkeypatch.setenv("SPECDEC_JSON", "1")
    assert parse_options(options, [], program="generate.py").as_json is True


def test_off_in_a_file_is_what_the_option_takes_it_for(phase: Phase, tmp_path: Path) -> None:
    from common.options import parse_options

    options = importlib.import_module(f"{phase.package}.options").Options
    words = [field for field, info in options.model_fields.items() if info.default == "off"]
    file = tmp_path / "c.yaml"
    file.write_text("\n".join(["json: yes", *(f"{word}: off" for word in words)]))
    got = parse_options(options, ["--config", str(file)], program="generate.py")
    assert got.as_json is True
    assert {getattr(got, word) for word in words} <= {"off"}


def test_config_yaml_holds_every_option_with_its_default(phase: Phase) -> None:
    options = importlib.import_module(f"{phase.package}.options").Options
    written = yaml.safe_load((phase.folder / "config.yaml").read_text())
    expected = {
        (info.alias or field).replace("_", "-"): info.default
        for field, info in options.model_fields.items()
        if field != "config"
    }
    assert written == expected


def test_an_interrupted_run_keeps_what_it_has(
    phase: Phase, run: Run, engine: ModuleType, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = engine.LLM.run

    def interrupted(*arguments: Any, **more: Any) -> Any:
        for step, _ in enumerate(whole(*arguments, **more), start=1):
            yield
            if step == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(engine.LLM, "run", interrupted)
    status, out, err = run("--model", llama_folder, "--prompt", "import ", "--json", "--max-tokens", "100")
    assert status == 130
    completion = json.loads(out)["completions"][0]
    assert completion["finish_reason"] == "interrupted"
    assert 3 <= len(completion["tokens"]) <= (3 if phase.number < 5 else 65)  # a call into C++ ends by itself
    assert "interrupted" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", ""], ["prompt is empty"]),
        (["--temperature", "-1"], ["--temperature", "greater than or equal to 0"]),
        (["--temperature", "nan"], ["--temperature"]),
        (["--temperature", "hot"], ["--temperature", "valid number"]),
        (["--top-p", "0"], ["--top-p"]),
        (["--top-p", "1.5"], ["--top-p"]),
        (["--top-k", "-1"], ["--top-k"]),
        (["--max-tokens", "0"], ["--max-tokens"]),
        (["--max-tokens", "2.5"], ["--max-tokens", "integer"]),
        (["--n", "0"], ["--n"]),
        (["--threads", "-2"], ["--threads"]),
        (["--threads", "1000000"], ["--threads", f"at most {most_threads()}"]),
        (["--threads", "99999999999"], ["--threads", f"at most {most_threads()}"]),
        (["--repetition-penalty", "0"], ["--repetition-penalty"]),
        (["--presence-penalty", "3"], ["--presence-penalty"]),
        (["--stop", ""], ["stop"]),
        (["--beams", "0"], ["--beams"]),
        (["--beams", "100000"], ["--beams", "1024"]),
        (["--beams", "4", "--temperature", "1"], ["--beams", "--temperature"]),
        (["--beams", "4", "--n", "2"], ["--beams", "--n"]),
        (["--beams", "4", "--stop", "x"], ["--beams", "--stop"]),
        (["--model", "no-such-model"], ["no-such-model", "stdlib-10m", "folder", "hub"]),
        (["--no-such-option"], ["--no-such-option", "--help"]),
        (["--dtype", "float64"], ["--dtype", "float32"]),
        (["--device", "cuda"], ["cuda", "cpu"]),
        (["--prompt-file", "missing.txt"], ["missing.txt"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
    ],
)
def test_wrong_options_get_one_line(run: Run, llama_folder: Path, arguments: list[str], words: list[str]) -> None:
    if arguments[:2] == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    given_prompt = [] if "--prompt" in arguments or "--prompt-file" in arguments else ["--prompt", "x"]
    model = [] if "--model" in arguments else ["--model", str(llama_folder)]
    assert_refused(run(*model, *given_prompt, *arguments), *words)


def test_more_prompts_than_memory_allows(run: Run, llama_folder: Path) -> None:
    result = run("--model", llama_folder, "--prompt", "x", "--n", 10**9, "--temperature", 1)
    assert_refused(result, "GiB", "1000000000", "--n")


def test_more_beams_than_memory_allows(
    run: Run, llama_folder: Path, engine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    beams = ["--model", llama_folder, "--prompt", "x", "--max-tokens", 2, "--beams"]
    where = "capacity" if hasattr(engine, "capacity") else "llm"
    monkeypatch.setattr(f"{engine.__name__}.{where}.available_memory", lambda device: 4 * 2**20)
    assert run(*beams, 8)[0] == 0
    assert_refused(run(*beams, 1000), "GiB", "1000 completions", "--beams")


def test_a_prompt_longer_than_the_context_is_noted_once(run: Run, llama_folder: Path) -> None:
    status, _, err = run("--model", llama_folder, "--prompt", "import os\n" * 200, "--max-tokens", 3)
    assert status == 0
    assert err.count("note:") == 1
    assert err.count("\n") == 2


def test_wrong_yaml_and_environment_are_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("max-tokenz: 7\n")
    assert_refused(run("--config", file, "--prompt", "x"), "max_tokenz", "max_tokens")
    file.write_text("max-tokens: many\n")
    assert_refused(run("--config", file, "--prompt", "x"), "max_tokens", "many")
    file.write_text("just text\n")
    assert_refused(run("--config", file, "--prompt", "x"), str(file))
    file.write_text("a: [1\n")
    assert_refused(run("--config", file, "--prompt", "x"), "YAML")
    file.write_text("top-k: 1\nseed: 2\ntop_k: 3\n")
    assert_refused(run("--config", file, "--prompt", "x"), "YAML", "top_k", "twice", "line 3")
    monkeypatch.setenv("SPECDEC_MAX_TOKENS", "lots")
    assert_refused(run("--prompt", "x"), "SPECDEC_MAX_TOKENS", "lots")


def test_closed_stdin(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert_refused(run(), "stdin", "--prompt")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert_refused(run(), "prompt is empty")


@pytest.fixture
def broken(llama_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in llama_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_broken_checkpoints_are_explained(run: Run, broken: Path) -> None:
    weights = broken / "model.safetensors"
    tensors = load_file(weights)

    def attempt() -> tuple[int, str, str]:
        return run("--model", broken, "--prompt", "x")

    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, weights, {"format": "pt"})
    assert_refused(attempt(), name, "missing")
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, weights, {"format": "pt"})
    assert_refused(attempt(), name, "[63, 48]", "[64, 48]")
    save_file({**tensors, "model.layers.1.mlp.side_proj.weight": tensors[name].clone()}, weights, {"format": "pt"})
    assert_refused(attempt(), "side_proj", "unknown")
    save_file(tensors, weights, {"format": "pt"})
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(attempt(), "model.safetensors")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    assert_refused(attempt(), "BertModel", "LlamaForCausalLM", "Qwen3ForCausalLM")
    (broken / "config.json").unlink()
    assert_refused(attempt(), "config.json")


words = st.sampled_from(["--top-k", "--top-p", "--min-p", "--temperature", "--max-tokens", "--n", "--seed", "--stop"])
values = st.one_of(st.integers(-3, 3), st.floats(), st.text(max_size=5), st.just("--json"))


@given(pairs=st.lists(st.tuples(words, values), max_size=4))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_options_lead_to_a_traceback(llama_folder: Path, pairs: list[tuple[str, object]]) -> None:
    from common.options import parse_options
    from phase1.options import Options

    try:
        options = parse_options(Options, [str(part) for pair in pairs for part in pair], program="generate.py")
        params = options.sampling_params()
    except UserError as error:
        lines = str(error).splitlines()
        assert len(lines) == 1
    else:
        assert params.max_new_tokens >= 1
        assert params.temperature >= 0
        assert 0 < params.top_p <= 1
