"""What HTTP costs over the engine, and this server beside another one: a closed loop of clients, greedy.

Server and clients are separate processes; the local engine runs in the process of the clients. All compute the same
requests, and ours must give the same tokens.

    python bench.py --only serving --output results
    python bench.py --only peers --output results

The other servers (`peers`) are `transformers serve`, in an environment that `make interop` makes (INTEROP names its
folder), and llama.cpp's llama-server (LLAMA_SERVER names the program; else it is looked for in PATH). One that is not
there is a row with the reason.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from serving.client import Client

import engine
from common.benchmark import Outcome, WrongResult
from common.checkpoint import open_checkpoint
from common.errors import UserError
from common.harness import Bench, Variant
from common.phases import ROOT
from common.prompts import Prompt
from engine.config import ModelConfig
from engine.kernels.cpp import default_threads

from . import llama_cpp

SERVING = {
    "serving": "greedy; each of `clients` sends one request after the other, with 64 new tokens; seconds are those "
    "until the last has ended",
    "first": "the time to the first token of one request at a time; a prompt that the cache does not know",
    "peers": "the same closed loop against other servers with the same weights, in float32",
    "ttft_ms": "from sending a request to the first text; mean over the requests",
    "agreement": "share of the requests whose text is this server's; rounding may part greedy texts",
}
TOKENS, REQUESTS = 64, 3  # of a request; of a client
PHASE = Path(__file__).resolve().parent.parent
Send = Callable[[str, int], tuple[list[int], float, str]]  # a prompt -> token ids, seconds to the first, text


def measure_serving(
    lab: Bench, sections: Sequence[str] = ("serving", "first"), clients: Sequence[int] = (1, 8)
) -> None:
    """Compare the engine in this process with the server in another one."""
    cell = {"model": lab.options.model, "format": "float32"}
    with ExitStack() as stack:
        ask: dict[str, Callable[[], Send]] = dict.fromkeys(("local engine", "HTTP, streamed", "HTTP"), nothing)
        if not lab.options.dry_run:
            url = stack.enter_context(ours(lab))
            llm = engine.LLM(
                engine.Options(model=lab.options.model, dtype="float32", batch_size=8, threads=lab.options.threads or 0)
            )
            local = stack.enter_context(engine.AsyncLLMEngine(engine.LLMEngine(llm)))

            def connected(send: Callable[..., Any]) -> Send:
                return partial(send, stack.enter_context(Client(url)))

            ask = {
                "local engine": lambda: partial(in_process, local),
                "HTTP, streamed": lambda: connected(partial(streamed, k=0)),
                "HTTP": lambda: connected(whole),
            }
        for count in clients if "serving" in sections else ():
            loops = {name: closed_loop(lab, [make() for _ in range(count)]) for name, make in ask.items()}
            lab.compare("serving", {**cell, "clients": count}, loops, exact=list(loops)[1:])
        if "first" in sections:
            lab.compare("first", cell, {name: first_token(lab, ask[name]()) for name in list(ask)[:2]})


def measure_peers(lab: Bench, clients: Sequence[int] = (1, 8)) -> None:
    """Compare this server, plain and with drafts, with those of transformers and of llama.cpp."""
    folder = open_checkpoint(lab.options.model).folder
    with ExitStack() as stack:
        mine = stack.enter_context(ours(lab))
        others = dict[str, str]()
        for name, (start, _) in PEERS.items():
            try:
                others[name] = stack.enter_context(start(folder))
            except UserError as error:
                lab.refuse("peers", {"model": lab.options.model, "format": "float32"}, name, str(error))
        for count in clients:
            texts = dict[str, str]()

            def loop(send: Callable[..., Any], url: str, model: str | None = None, **how: Any) -> Variant:
                each = [stack.enter_context(Client(url, model)) for _ in range(count)]  # noqa: B023 (called at once)
                return closed_loop(lab, [partial(send, client, **how) for client in each], texts)  # noqa: B023

            loops = {"ours": loop(streamed, mine, k=0), "ours, speculative": loop(streamed, mine, controller="cost")}
            loops |= {name: loop(foreign, url, str(folder), **PEERS[name][1]) for name, url in others.items()}
            lab.compare("peers", {"model": lab.options.model, "format": "float32", "clients": count}, loops)


def nothing() -> Send:
    """In a dry run nobody asks."""
    raise AssertionError("a dry run computes nothing")


@contextmanager
def program(command: list[str], url: str) -> Iterator[str]:
    """Run a server until the end of the block."""
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with Client(url) as client:
            client.wait(180)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


@contextmanager
def ours(lab: Bench) -> Iterator[str]:
    port, threads = free_port(), str(lab.options.threads or 0)
    command = [sys.executable, str(PHASE / "serve.py"), "--port", str(port), "--model", lab.options.model]
    command += ["--dtype", "float32", "--batch-size", "8", "--threads", threads, "--shutdown-timeout", "0"]
    with program(command, f"http://127.0.0.1:{port}") as url:
        yield url


@contextmanager
def transformers_serve(folder: Path) -> Iterator[str]:
    """UserError if it is not installed."""
    port = free_port()
    python = Path(os.environ.get("INTEROP", ROOT / ".venv" / "interop")).absolute() / "transformers" / "bin" / "python"
    if not python.exists():
        raise UserError(f"{python} does not exist: `make interop` makes this environment; INTEROP names its folder")
    script = "from transformers.cli.transformers import main; main()"
    command = [str(python), "-c", script, "serve", str(folder), "--port", str(port), "--dtype", "float32"]
    command += ["--device", "cpu"]
    with program(command, f"http://127.0.0.1:{port}") as url:
        yield url


@contextmanager
def llama_server(folder: Path) -> Iterator[str]:
    """Serve the same weights from a GGUF file, eight requests at once. UserError if it cannot be done."""
    found = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
    if found is None or not Path(found).is_file():
        raise UserError("there is no llama-server: LLAMA_SERVER names the program")
    if (reason := llama_cpp.why_not(config := ModelConfig.from_hf(open_checkpoint(str(folder)).config))) is not None:
        raise UserError(reason)
    port = free_port()
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "model.gguf"
        llama_cpp.write_gguf(folder, config, file, "f32")
        command = [found, "--model", str(file), "--port", str(port), "--threads", str(default_threads())]
        command += ["--parallel", "8", "--ctx-size", str(8 * config.context), "--alias", str(folder), "--no-webui"]
        with program(command, f"http://127.0.0.1:{port}") as url:
            yield url


# What starts a server, and its fields. transformers refuses `ignore_eos`: a text that ends early counts as whole.
PEERS: dict[str, tuple[Callable[[Path], AbstractContextManager[str]], dict[str, Any]]] = {
    "transformers serve": (transformers_serve, {}),
    "llama-server": (llama_server, {"ignore_eos": True}),
}


def in_process(local: engine.AsyncLLMEngine, text: str, tokens: int) -> tuple[list[int], float, str]:
    params = engine.SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    began, first, told, said = time.perf_counter(), 0.0, list[int](), ""
    for output in local.stream(text, params, k=0):
        told, said = told + output.tokens, said + output.text
        first = first or (time.perf_counter() - began if said else 0.0)
    return told, first, said


def streamed(client: Client, text: str, tokens: int, **how: Any) -> tuple[list[int], float, str]:
    asked = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, **how}
    reply = client.streamed(text, max_tokens=tokens, **asked)
    assert reply.first_s is not None
    ids = [choice["token_ids"] for chunk in reply.chunks for choice in chunk.body["choices"]]
    return [token for each in ids for token in each], reply.first_s, reply.text


def whole(client: Client, text: str, tokens: int) -> tuple[list[int], float, str]:
    reply = client.complete(text, max_tokens=tokens, temperature=0, ignore_eos=True, k=0, return_token_ids=True)
    return reply.body["choices"][0]["token_ids"], reply.total_s, reply.text


def foreign(client: Client, text: str, tokens: int, **how: Any) -> tuple[list[int], float, str]:
    reply = client.streamed(text, max_tokens=tokens, temperature=0, **how)
    client.close()  # llama-server ends a connection after some requests, without telling; the next one opens another
    return [], reply.first_s or reply.total_s, reply.text


def closed_loop(lab: Bench, sends: list[Send], texts: dict[str, str] | None = None) -> Variant:
    """Return a run of a thread for each client, which sends REQUESTS prompts one after the other."""
    clients = len(sends)
    requests = 1 if lab.options.quick else REQUESTS
    prompts = [prompt.text for prompt in lab.prompts(clients * requests)]
    jobs = [[prompts[(at * requests + i) % len(prompts)] for i in range(requests)] for at in range(clients)]

    def client(send: Send, job: list[str]) -> list[tuple[list[int], float, str]]:
        return [send(text, TOKENS) for text in job]

    def run(prompt: Prompt | None, round_: int) -> Outcome:
        with ThreadPoolExecutor(clients) as pool:
            found = [each for of_client in pool.map(client, sends, jobs) for each in of_client]
        figures: dict[str, Any] = {"ttft_ms": 1e3 * sum(first for _, first, _ in found) / len(found)}
        if texts is not None:
            asked = [text for job in jobs for text in job]
            same = [texts.setdefault(text, each[2]) == each[2] for text, each in zip(asked, found, strict=True)]
            figures["agreement"] = sum(same) / len(same)
        if not all(text for _, _, text in found):
            raise WrongResult("an answer without text")
        return Outcome(len(found) * TOKENS, figures, [token for tokens, _, _ in found for token in tokens])

    return run


def first_token(lab: Bench, send: Send) -> Variant:
    """Return a run of several requests of one token; every prompt is new, so that no cache knows it."""
    prompts, number = [prompt.text for prompt in lab.prompts(8)], iter(range(10**9))

    def run(prompt: Prompt | None, round_: int) -> Outcome:
        seconds = [send(f"# {next(number)}\n{text}", 1)[1] for text in prompts]
        return Outcome(len(seconds), {"ttft_ms": 1e3 * sum(seconds) / len(seconds)}, seconds=sum(seconds))

    return run
