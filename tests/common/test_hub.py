"""The hub path on a real server: a small hub on 127.0.0.1, and huggingface_hub in separate processes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import save

import common.checkpoint
from common.checkpoint import open_checkpoint

ROOT = Path(common.checkpoint.__file__).parents[1]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@dataclass
class Hub:
    """The files of the server, its faults, and the requests."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    faults: dict[str, list[str]] = field(default_factory=dict)  # of the next GETs of a file: "cut" or "unavailable"
    requests: list[str] = field(default_factory=list)  # "GET model.safetensors 0-", the range last

    def downloads(self, kind: str) -> list[str]:
        return [line.split()[1] for line in self.requests if line.startswith("GET ") and kind in line]


class Handler(BaseHTTPRequestHandler):
    """HEAD and GET of /OWNER/NAME/resolve/REVISION/FILE, as on huggingface.co."""

    protocol_version = "HTTP/1.1"
    hub: Hub  # set on the subclass that a server uses

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, body: bool) -> None:
        repository, _, rest = self.path.strip("/").partition("/resolve/")
        _, _, filename = rest.partition("/")
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.hub.requests.append(f"{self.command} {filename} {start}-")
        files = self.hub.repositories.get(repository)
        commit = hashlib.sha1(repository.encode()).hexdigest()
        if files is None:
            return self.refuse(401, "RepoNotFound")
        if repository in self.hub.gated:
            return self.refuse(403, "GatedRepo")
        if filename not in files:
            return self.refuse(404, "EntryNotFound", commit)
        faults = self.hub.faults.get(filename, []) if body else []
        fault = faults.pop(0) if faults else ""
        if fault == "unavailable":
            return self.refuse(503, "")
        content = files[filename]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            self.wfile.write(content[start : len(content) // 2 if fault == "cut" else None])
        self.close_connection = fault == "cut"

    def refuse(self, status: int, code: str, commit: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def weights(*names: str, length: int = 3000) -> bytes:
    return save({name: torch.arange(float(length)) for name in names})


def files() -> dict[str, bytes]:
    """Make a small repository. The tokenizer is not read here."""
    texts = {"config.json": b"{}", "generation_config.json": b"{}", "tokenizer.json": b"{}", "README.md": b"a model"}
    return texts | {"model.safetensors": weights("a", "b"), "pytorch_model.bin": b"the same once more"}


@dataclass(frozen=True)
class Outcome:
    status: int
    message: str  # the hash, or the error
    files: list[str]


@dataclass(frozen=True)
class Client:
    """Opens hub models, each time in a new process (huggingface_hub reads its environment once), with one cache."""

    url: str
    home: Path

    CODE = """
import json, sys
from common.checkpoint import open_checkpoint
from common.errors import UserError
def check(config):
    if config.get("model_type") == "unsupported":
        raise UserError("not supported")
try:
    checkpoint = open_checkpoint(sys.argv[1], check)
except UserError as error:
    print(json.dumps([2, str(error), []]))
else:
    print(json.dumps([0, checkpoint.content_hash(), sorted(path.name for path in checkpoint.folder.iterdir())]))
"""

    def open(self, name: str, **environment: str) -> Outcome:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-c", self.CODE, name],
            env=inherited | settings | environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            check=True,
        )
        outcome = Outcome(*json.loads(done.stdout))
        assert "\n" not in outcome.message
        return outcome


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(hub.url, tmp_path)


def hash_of(content: dict[str, bytes], folder: Path) -> str:
    """Return the hash of the same files in a local folder: equal hashes mean that every byte arrived."""
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return open_checkpoint(str(folder)).content_hash()


def test_download_then_cache_then_offline(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.repositories["owner/name"] = files()
    expected = Outcome(
        0,
        hash_of(files(), tmp_path / "local"),
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"],  # one format, no README
    )
    assert client.open("owner/name") == expected
    assert hub.downloads("model.safetensors") == ["model.safetensors"]

    hub.requests.clear()
    assert client.open("owner/name") == expected
    assert hub.downloads("") == []
    assert len(hub.requests) == 2, "a look for a newer commit is all that a cached model should cost"

    hub.requests.clear()
    assert client.open("owner/name", HF_HUB_OFFLINE="1") == expected
    assert hub.requests == []
    assert client.open("owner/name", HF_ENDPOINT="http://127.0.0.1:9") == expected, "no hub there, but a cache"


def test_a_model_that_cannot_be_used_is_refused_before_its_weights(hub: Hub, client: Client) -> None:
    hub.repositories["owner/name"] = files() | {"config.json": b'{"model_type": "unsupported"}'}
    outcome = client.open("owner/name")
    assert (outcome.status, outcome.message) == (2, "owner/name: not supported")
    assert hub.downloads("") == ["config.json"]


def test_legacy_name_with_sharded_weights_and_a_tokenizer_in_parts(hub: Hub, client: Client, tmp_path: Path) -> None:
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    content = files() | {"model.safetensors.index.json": json.dumps(index).encode(), "vocab.json": b"{}"}
    content |= {SHARDS[0]: weights("a"), SHARDS[1]: weights("b")}
    del content["model.safetensors"], content["tokenizer.json"]
    hub.repositories["gpt2"] = content
    outcome = client.open("gpt2")
    assert outcome.message == hash_of(content, tmp_path / "local")
    assert {*SHARDS, "vocab.json"} < set(outcome.files)
    assert hub.downloads("pytorch_model") == []

    del content[SHARDS[1]]
    other_cache = Client(hub.url, tmp_path / "local")
    assert (
        f"the shard {SHARDS[1]}, which model.safetensors.index.json names: not in" in other_cache.open("gpt2").message
    )


def test_bin_where_there_are_no_safetensors(hub: Hub, client: Client) -> None:
    hub.repositories["owner/old"] = files()
    del hub.repositories["owner/old"]["model.safetensors"]
    assert "pytorch_model.bin" in client.open("owner/old").files


def test_a_dropped_connection_is_resumed(hub: Hub, client: Client, tmp_path: Path) -> None:
    content = files() | {"model.safetensors": weights("a", length=6_000_000)}  # huggingface_hub keeps 10 MB at a time
    hub.repositories["owner/name"] = content
    hub.faults["model.safetensors"] = ["cut"]
    assert client.open("owner/name").message == hash_of(content, tmp_path / "local")
    _, again = (line for line in hub.requests if line.startswith("GET model.safetensors"))
    assert not again.endswith(" 0-"), "the second request asks for the rest alone"


def test_an_interrupted_download_loads_nothing_and_a_second_call_completes_it(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    hub.repositories["owner/name"] = files()
    hub.faults["model.safetensors"] = ["cut", "unavailable"]
    broken = client.open("owner/name")
    assert broken.status == 2
    assert "the download of model.safetensors failed (" in broken.message
    offline = client.open("owner/name", HF_HUB_OFFLINE="1")
    assert "weights (one of model.safetensors, " in offline.message
    assert "not in the cache, and HF_HUB_OFFLINE is set" in offline.message

    hub.requests.clear()
    assert client.open("owner/name").message == hash_of(files(), tmp_path / "local")
    assert hub.downloads("") == ["model.safetensors"], "what was complete is kept"


def test_offline_with_nothing_in_the_cache(hub: Hub, client: Client) -> None:
    hub.repositories["owner/name"] = files()
    outcome = client.open("owner/name", HF_HUB_OFFLINE="1")
    assert outcome.status == 2
    assert outcome.message.startswith("unknown model 'owner/name': HF_HUB_OFFLINE is set")
    assert hub.requests == []


def test_no_hub_to_be_reached_fails_at_once(client: Client) -> None:
    outcome = client.open("owner/name", HF_ENDPOINT="http://127.0.0.1:9")
    assert outcome.message.startswith("unknown model 'owner/name': the hub cannot be reached (")


def test_what_the_hub_does_not_have_or_give(hub: Hub, client: Client) -> None:
    missing = client.open("sdtlib-10m")
    assert missing.message.startswith("unknown model 'sdtlib-10m': the hub has no such model")
    assert "a hub model as owner/name" in missing.message

    hub.repositories["owner/empty"] = {"README.md": b"no model yet"}
    assert "the hub's repository holds no config.json" in client.open("owner/empty").message

    hub.repositories["owner/bare"] = {"config.json": b"{}"}
    assert client.open("owner/bare").message.endswith(": not in the repository")

    hub.repositories["owner/gated"] = files()
    hub.gated.add("owner/gated")
    assert "accept the model's terms" in client.open("owner/gated").message
