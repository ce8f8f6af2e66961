"""Programs that nobody here wrote, each from an environment of its own: `make interop` makes them, and runs this file.

transformers serve, lm-eval, GuideLLM, AIPerf, LiteLLM and Ray. What is not installed is skipped, with the reason.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import phase7
from common.checkpoint import open_checkpoint
from common.perplexity import token_nll
from common.phases import ROOT, phases
from common.prompts import load_prompts
from common.results import read_rows
from tests.support import interop
from tests.support.beside import beside
from tests.support.interop import python
from tests.support.serving import Served, in_thread

pytestmark = pytest.mark.slow
MODEL = "stdlib-10m"
FOLDER = open_checkpoint(MODEL).folder


def script(name: str, program: str) -> str:
    return str(python(name).with_name(program))


def run(command: list[str], folder: Path, **variables: str) -> str:
    """Run a program to its end; return what it printed."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=1200,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none", "TOKENIZERS_PARALLELISM": "0", **variables},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with in_thread(model=MODEL, draft="none", batch_size=8) as found:
        yield found


@contextmanager
def transformers_serve() -> Iterator[str]:
    executable = str(python("transformers"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    start = "from transformers.cli.transformers import main; main()"
    command = [executable, "-c", start, "serve", str(FOLDER), "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen([*command, "--dtype", "float32"], env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_the_same_greedy_text_as_transformers_serve(served: Served) -> None:
    clients = beside(7, "serving.client")
    with transformers_serve() as url, clients.Client(url, str(FOLDER), timeout=600) as theirs:
        theirs.wait(180)
        with clients.Client(served.url) as ours:
            for prompt in load_prompts("code", "test")[:5]:
                mine = ours.streamed(prompt.text, max_tokens=32, temperature=0)
                other = theirs.streamed(prompt.text, max_tokens=32, temperature=0)
                assert other.text == mine.text
                assert other.first_s is not None


def test_lm_eval_finds_our_bits_per_byte(served: Served, tmp_path: Path) -> None:
    """Its local-completions asks for log-probabilities of the prompt, with one token before the text."""
    program = script("lm-eval", "lm_eval")
    texts = [prompt.text for prompt in load_prompts("code", "test")[:4]]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "local.yaml").write_text(
        f"""task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/texts.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
    )
    how = f"model={MODEL},base_url={served.url}/v1/completions,tokenizer={FOLDER},max_length=1024,num_concurrent=2"
    command = [program, "run", "--model", "local-completions", "--model_args", how, "--tasks", "local"]
    run([*command, "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")], tmp_path)
    (written,) = (tmp_path / "out").rglob("results*.json")
    theirs = json.loads(written.read_text())["results"]["local"]["bits_per_byte,none"]

    loaded = phase7.load(MODEL, torch.float32, torch.device("cpu"))
    nll, size = 0.0, 0
    for text in texts:
        tokens = [loaded.tokenizer.eos_ids[0], *loaded.tokenizer.encode(text)]

        def logits(window: torch.Tensor) -> torch.Tensor:
            ids = window[0].tolist()
            draft = phase7.Tree.chain(ids[1:])
            return phase7.target_forward(loaded.model, [ids[:1]], [draft]).logits

        nll += token_nll(logits, torch.tensor(tokens), 1024, 1024).double().sum().item()
        size += len(text.encode())
    assert theirs == pytest.approx(nll / size / torch.log(torch.tensor(2.0, dtype=torch.float64)).item(), abs=1e-6)


def test_guidellm(served: Served, tmp_path: Path) -> None:
    command = [script("guidellm", "guidellm"), "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={served.url},model={MODEL},request_format=/v1/completions"]
    command += ["--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=16"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={FOLDER}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"]
    run([*command, "--output", f"kind=json,path={tmp_path}/report.json"], tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert found["successful"] == 16
    assert found["errored"] == 0


def hub(folder: Path) -> str:
    """Make a cache of the hub that has the model, and return its name there: AIPerf takes no folder."""
    name, commit = f"lab/{MODEL}", "0" * 40
    cached = folder / "hub" / f"models--{name.replace('/', '--')}"
    for part in ("refs", "snapshots"):
        (cached / part).mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit).symlink_to(FOLDER.absolute())
    return name


def test_aiperf(served: Served, tmp_path: Path) -> None:
    command = [script("aiperf", "aiperf"), "profile"]
    command += ["--model", MODEL, "--url", served.url, "--endpoint-type", "completions"]
    command += ["--streaming", "--concurrency", "4", "--request-count", "16", "--tokenizer", hub(tmp_path)]
    run([*command, "--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "16", "--ui", "none"], tmp_path,
        HF_HOME=str(tmp_path))  # fmt: skip
    (written,) = tmp_path.rglob("profile_export_aiperf.json")
    assert json.loads(written.read_text())["request_count"]["avg"] == 16


def test_litellm(served: Served, tmp_path: Path) -> None:
    code = f"""
import litellm
how = dict(model="text-completion-openai/{MODEL}", api_base="{served.url}/v1", api_key="none", max_tokens=8)
how["temperature"] = 0
whole = litellm.text_completion(prompt="import os", **how)
parts = litellm.text_completion(prompt="import os", stream=True, **how)
text = "".join(part.choices[0].text or "" for part in parts)
assert text == whole.choices[0].text, (text, whole)
assert whole.usage.completion_tokens == 8
print(text)
"""
    said = run([str(python("litellm")), "-c", code], tmp_path)
    assert served.post(prompt="import os", max_tokens=8, temperature=0)["choices"][0]["text"] in said


def test_ray_runs_the_cells_of_a_sweep(tmp_path: Path) -> None:
    """On a cluster of this machine that the sweep starts."""
    command = [str(python("ray")), "-m", "instruments.sweep", "--model", MODEL, "--ray", "local", "--no-plots"]
    command += ["--grid", "drafter=ngram", "k=2,4", "dtype=float32,bfloat16", "--prompts", "2", "--rounds", "1"]
    command += ["--max-tokens", "8", "--threads", "1", "--device", "cpu", "--output", str(tmp_path / "sweep")]
    folder = phases()[-1].folder
    run(command, folder, PYTHONPATH=os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", ""), str(ROOT))))
    rows = read_rows(tmp_path / "sweep")
    assert {row.status for row in rows} == {"ok"}
    assert {row.cell["dtype"] for row in rows if row.kind == "run"} == {"float32", "bfloat16"}


def test_a_program_that_cannot_be_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interop, "FOLDER", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    line = interop.install(interop.Program("foreign", ("no-such-program==1",)))
    assert line.startswith("foreign: pip cannot install no-such-program==1: ERROR: ")
    with pytest.raises(pytest.skip.Exception) as skipped:
        python("foreign")
    assert str(skipped.value) == line
