"""Latency under load: the schedule is fixed before, latencies count from it, and bad answers are rows with reasons."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from common.errors import UserError
from common.prompts import Prompt
from common.results import Row, read_rows
from tests.support.beside import beside

arrivals = beside(7, "instruments.arrivals")
latency = beside(7, "instruments.latency")
loads = beside(7, "instruments.loads")
targets = beside(7, "instruments.targets")
formats = beside(7, "instruments.formats")
PROMPT = Prompt("p", "own", "test", "text", "", "")


@pytest.mark.about("instruments/arrivals.py, schedule")
def test_a_schedule_depends_on_the_seed_alone_and_has_the_rate() -> None:
    for name in ("poisson", "bursts", "even"):
        times = arrivals.schedule(name, 5.0, 4000, 1)
        assert times == arrivals.schedule(name, 5.0, 4000, 1)
        assert times == sorted(times)
        assert times[0] == 0
        assert 4000 / times[-1] == pytest.approx(5.0, rel=0.12)
    assert times != arrivals.schedule("poisson", 5.0, 4000, 2)
    gaps = np.diff(arrivals.schedule("poisson", 5.0, 20000, 1))
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # of an exponential law
    bursts = arrivals.schedule("bursts", 5.0, 32, 1)
    assert all(len(set(bursts[at : at + 8])) == 1 for at in range(0, 32, 8))
    with pytest.raises(UserError, match="rate above 0"):
        arrivals.schedule("poisson", 0.0, 5, 1)


class Stalled:
    """Answers one request at a time, each after 0.1 s: a server that falls behind."""

    name, where = "stalled", "here"

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def stream(self, ask: Any) -> Iterator[Any]:
        with self.lock:
            time.sleep(0.1)
            yield targets.Chunk(1, "a")
            yield targets.Chunk(2, "bc")


class Together(Stalled):
    """Answers no request before so many have come."""

    def __init__(self, requests: int) -> None:
        super().__init__()
        self.all = threading.Barrier(requests, timeout=60)

    def stream(self, ask: Any) -> Iterator[Any]:
        self.all.wait()
        yield targets.Chunk(3, "abc")


def test_latency_counts_from_the_scheduled_arrival() -> None:
    """Five requests arrive at once: each waits for those before it, though the server needs 0.1 s for any of them."""
    asks = [(PROMPT, targets.Ask("text", 3, 0.0, at)) for at in range(5)]
    served = latency.load(Stalled(), asks, [0.0] * 5, lambda _: None)
    first = sorted(each.figures()["ttft_ms"] for each in served)
    assert min(first[0], *np.diff(first)) >= 100  # and more on a machine that has other work
    assert [each.tokens for each in served] == [3] * 5
    assert served[0].figures()["tokens_per_chunk"] == 1.5


def test_the_next_request_does_not_wait_for_the_last() -> None:
    asks = [(PROMPT, targets.Ask("text", 3, 0.0, at)) for at in range(4)]
    served = latency.load(Together(4), asks, [0.0, 0.01, 0.02, 0.03], lambda _: None)
    assert [(each.error, each.tokens) for each in served] == [(None, 3)] * 4


@pytest.mark.about("instruments/latency.py, Served.figures")
def test_definitions_of_latencies() -> None:
    served = latency.Served(PROMPT, 1.0, 1.001, [(1.5, 1), (1.7, 2), (2.0, 1)])
    figures = served.figures()
    assert figures["ttft_ms"] == pytest.approx(500)
    assert figures["e2e_ms"] == pytest.approx(1000)
    assert figures["tpot_ms"] == pytest.approx(500 / 3)
    assert figures["itl_ms"] == pytest.approx([200, 300])
    assert figures["late_ms"] == pytest.approx(1)


def request_row(number: int, ttft: float, rate: float = 2.0) -> Row:
    figures = {
        "scheduled_s": number / rate,
        "late_ms": 0.1,
        "ttft_ms": ttft,
        "e2e_ms": ttft + 100,
        "itl_ms": [50.0, 50.0],
    }
    figures |= {"tokens_per_chunk": 1.0, "prompt_tokens": 7, "tpot_ms": 50.0}
    return Row(
        kind="count", section="latency", cell={"arrivals": "poisson", "rate": rate}, variant="request",
        prompt=str(number), seconds=(ttft + 100) / 1e3, tokens=3.0, figures=figures,
    )  # fmt: skip


@pytest.mark.about("instruments/loads.py, needed")
def test_percentiles_need_so_many_requests_that_one_lies_beyond() -> None:
    assert [loads.needed(share) for share in (0.5, 0.9, 0.99)] == [5, 29, 299]
    (line,) = loads.summary([request_row(at, float(at)) for at in range(28)])
    assert line["ttft_p50"] == 13.5
    assert line["ttft_p90"] is None
    assert line["itl_p90"] is None  # many gaps, but of too few requests
    (line,) = loads.summary([request_row(at, float(at)) for at in range(299)])
    assert line["ttft_p99"] == pytest.approx(np.quantile(range(299), 0.99))


def test_goodput_counts_requests_that_met_every_objective() -> None:
    rows = [request_row(at, 100.0 if at % 2 else 300.0) for at in range(10)]
    bad = rows[9].model_copy(update={"status": "failed", "reason": "broken", "figures": {}, "prompt": "x"})
    (line,) = loads.summary([*rows, bad], {"ttft_ms": 200.0, "tpot_ms": 60.0})
    assert line["met"] == 5 / 11
    assert line["goodput"] == pytest.approx(5 / line["seconds"])
    assert line["failed"] == 1


USAGE = {"include_usage": True, "continuous_usage_stats": True}


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


class Server(BaseHTTPRequestHandler):
    """A completions server whose answer depends on the prompt."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[dict[str, Any]]] = []
    over: ClassVar[threading.Event] = threading.Event()  # until then a slow answer does not go on

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "small"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        ask = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(ask)
        how = ask["prompt"]
        self.send_response(503 if how == "busy" else 200)
        self.send_header("Connection", "close")
        self.end_headers()
        if how == "busy":
            self.wfile.write(b'{"error": "no room"}')
            return
        self.wfile.write(b": comment\n\n" + event(choices=[{"text": "a"}]))
        self.wfile.flush()
        if how == "slow":
            self.over.wait(60)
        if how == "broken":
            self.wfile.write(b"data: {not json\n\n")
        if how == "odd":
            self.wfile.write(b'data: {"choices": 5}\n\n')
        if how == "reports":
            self.wfile.write(event(error={"message": "out of memory"}))
        if how == "cut":
            return
        self.wfile.write(event(choices=[{"text": "bc"}]))
        self.wfile.write(event(choices=[], usage={"completion_tokens": 3, "prompt_tokens": 9}) + b"data: [DONE]\n\n")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    Server.over.set()
    server.shutdown()


def ask_url(url: str, *prompts: str, timeout: float = 60.0) -> list[Any]:
    with closing(targets.UrlTarget(url, None, timeout)) as target:
        assert target.name == "small"
        asks = [(PROMPT, targets.Ask(prompt, 3, 0.5, 4)) for prompt in prompts]
        found: list[Any] = latency.load(target, asks, [0.0] * len(asks), lambda _: None)
        assert target.idle  # connections are used again
        return found


def test_a_server_is_asked_for_a_stream_with_its_usage(url: str) -> None:
    (served,) = ask_url(f"{url}/v1", "good")
    assert (served.error, served.text, served.tokens, served.prompt_tokens) == (None, "abc", 3, 9)
    assert [tokens for _, tokens in served.chunks] == [1, 1]  # the usage at the end is no chunk
    asked = Server.asked[-1]
    assert (asked["stream"], asked["stream_options"], asked["max_tokens"]) == (True, USAGE, 3)
    assert (asked["model"], asked["temperature"], asked["seed"]) == ("small", 0.5, 4)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("broken", "not JSON: {not json"),
        ("odd", "a broken event"),
        ("reports", "out of memory"),
        ("cut", "ended without [DONE]"),
        ("busy", "(503): no room"),
        ("slow", "nothing came for 2 s"),
    ],
)
def test_a_bad_answer_is_a_row_with_its_reason_and_the_others_are_served(url: str, how: str, words: str) -> None:
    good, bad = ask_url(url, "good", how, timeout=2.0 if how == "slow" else 60.0)
    assert good.error is None
    rows = latency.rows_of([good, bad], {"rate": 1.0, "arrivals": "even"})
    assert [row.status for row in rows] == ["ok", "failed"]
    assert words in (rows[1].reason or "")
    assert [asked["prompt"] for asked in Server.asked].count(how) == 1


def test_a_server_that_is_down_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no OpenAI-compatible server answers /v1/models there"):
        latency.run(["--target", "http://127.0.0.1:9", "--requests", "2", "--output", str(tmp_path)])


def test_the_engine_here_is_loaded_and_every_request_is_a_row(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, vllm, llama = tmp_path / "out", tmp_path / "vllm.json", tmp_path / "llama.json"
    command = (
        f"--model {llama_folder} --draft none --rate 50 --rate 100 --requests 6 --prompts 3 --max-tokens 5 "
        f"--ignore-eos --device cpu --dtype float32 --output {out} --vllm {vllm} --llama {llama} --slo-ttft 100000"
    )
    status = latency.run(command.split())
    rows = read_rows(out)
    assert status == 0
    assert [row.cell["rate"] for row in rows] == [50.0] * 6 + [100.0] * 6
    assert all(row.tokens == 5 and row.figures["prompt_tokens"] > 0 for row in rows)
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [line["rate"] for line in document["lines"]] == [50.0, 100.0]
    assert document["lines"][0]["met"] == 1
    saved = json.loads(vllm.read_text(encoding="utf-8"))
    assert (saved["completed"], saved["request_rate"], saved["total_output_tokens"]) == (6, 100.0, 30)
    assert [test["n_gen"] for test in json.loads(llama.read_text(encoding="utf-8"))] == [5, 5]
    assert (out / "latency.png").is_file()


def test_the_format_of_vllm_has_seconds_and_milliseconds_where_its_own_has_them() -> None:
    rows = [request_row(at, 100.0 + at) for at in range(4)]
    (line,) = loads.summary(rows)
    found = formats.vllm_document(rows, line, "m")
    assert found["ttfts"] == pytest.approx([0.1, 0.101, 0.102, 0.103])
    assert found["itls"][0] == [0.05, 0.05]
    assert found["median_ttft_ms"] == pytest.approx(101.5)
    assert found["p99_e2el_ms"] == pytest.approx(float(np.percentile([200, 201, 202, 203], 99)))
    assert found["output_throughput"] == pytest.approx(12 / line["seconds"])
    assert found["total_token_throughput"] == pytest.approx((12 + 28) / found["duration"])
    assert math.isfinite(found["std_tpot_ms"])
