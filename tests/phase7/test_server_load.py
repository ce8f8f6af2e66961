"""A server under load: no wrong token, no lost block, no growth, and an answer or a refusal for everybody."""

from __future__ import annotations

import gc

import httpx
import psutil
import pytest

import phase7
from tests.support.load import PROMPTS, Load
from tests.support.serving import Program, Served, eventually


def check_tokens(load: Load, model: str) -> None:
    """Compare with the engine alone, plain and in this process."""
    llm = phase7.LLM(phase7.Options(model=model, device="cpu", dtype="float32", threads=1, draft="none"))
    wanted = list(load.tokens.items())
    params = [
        phase7.SamplingParams(temperature=1.0, seed=seed, max_new_tokens=length, ignore_eos=True)
        for (_, seed, length), _ in wanted
    ]
    found = llm.generate([PROMPTS[at] for (at, _, _), _ in wanted], params)
    assert [each.tokens for each in found] == [tokens for _, tokens in wanted]


def test_a_short_load(server: Served) -> None:
    load = Load(server.url, "stdlib-1m", longest=24)
    load.run(clients=8, seconds=2)
    assert not load.wrong, load.wrong[:3]
    assert load.counts["stream"] > 1
    eventually(server.rests)
    check_tokens(load, "stdlib-1m")


@pytest.mark.slow
def test_64_clients_for_two_minutes() -> None:
    """With drafts. Memory is compared after 30 s of warm-up and at the end."""
    with Program("--model", "stdlib-10m", "--dtype", "float32", "--batch-size", "16", "--max-queue", "64") as program:
        url, memory = program.url, psutil.Process(program.process.pid).memory_info
        load = Load(url, "stdlib-10m")
        load.run(clients=64, seconds=30)
        before = memory().rss
        load.seed = 1
        load.run(clients=64, seconds=120)
        growth = memory().rss / before - 1
        assert not load.wrong, (len(load.wrong), load.wrong[:3])
        print(dict(load.counts), f"growth {growth:.2%}")
        assert growth < 0.05
        eventually(lambda: "vllm:kv_cache_usage_perc{" in (text := httpx.get(f"{url}/metrics").text) and idle(text))
        check_tokens(load, "stdlib-10m")


def idle(text: str) -> bool:
    """Return True if nothing runs, nothing waits, and all blocks are free."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    lines = [line for line in text.splitlines() if line.startswith(names) and "{" in line]
    return len(lines) == 3 and all(float(line.split()[-1]) == 0 for line in lines)


@pytest.mark.slow
def test_10_000_requests_one_after_the_other() -> None:
    """Memory is flat: the second half adds less than 2%."""
    with Program("--model", "stdlib-1m") as program, httpx.Client(base_url=program.url, timeout=None) as client:
        memory, seen = psutil.Process(program.process.pid).memory_info, list[int]()
        for at in range(10_000):
            body = {"prompt": f"{PROMPTS[at % 8]} {at}", "max_tokens": 2, "stream": at % 3 == 0, "seed": at}
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200
            if at in (1000, 5000):
                seen.append(memory().rss)
        gc.collect()
        print([f"{rss / 2**20:.1f} MiB" for rss in [*seen, memory().rss]])
        assert memory().rss < 1.02 * seen[-1]
