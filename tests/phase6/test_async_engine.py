"""An engine in a thread of its own: streams for threads and tasks, errors for whom they concern, and an end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import phase6
from common.errors import UserError
from phase6 import AsyncLLMEngine
from tests.support.served import TEXT, Pair, Result, asked


@pytest.fixture
def serving(pair: Callable[..., Pair]) -> Iterator[tuple[Pair, AsyncLLMEngine]]:
    made = pair("torch", "model")
    with AsyncLLMEngine(made.engine(rows=3)) as engine:
        yield made, engine


def params(tokens: int, **more: Any) -> phase6.SamplingParams:
    return phase6.SamplingParams(max_new_tokens=tokens, ignore_eos=True, **more)


def joined(outputs: list[phase6.Output]) -> Result:
    tokens = [token for output in outputs for token in output.tokens]
    return Result(tokens, "".join(output.text for output in outputs), outputs[-1].finish_reason)


def test_threads_get_what_their_requests_get_alone(serving: tuple[Pair, AsyncLLMEngine]) -> None:
    made, engine = serving
    found = dict[int, Result]()

    def read(at: int) -> None:
        found[at] = joined(list(engine.stream(list(TEXT[at:]), params(10), k=3)))

    threads = [threading.Thread(target=read, args=(at,)) for at in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {at: made.alone(asked(TEXT[at:], tokens=10)) for at in range(6)}


def test_tasks_get_what_their_requests_get_alone(serving: tuple[Pair, AsyncLLMEngine]) -> None:
    made, engine = serving

    async def read(at: int) -> Result:
        return joined([output async for output in engine.generate(list(TEXT[at:]), params(10), k=3)])

    async def read_all() -> list[Result]:
        return await asyncio.gather(*map(read, range(6)))

    assert asyncio.run(read_all()) == [made.alone(asked(TEXT[at:], tokens=10)) for at in range(6)]


def test_a_step_wakes_an_event_loop_once(serving: tuple[Pair, AsyncLLMEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of samples that wait there."""
    _, engine = serving
    steps, wakes = list[int](), list[int]()
    step = engine.engine.step

    def counted() -> list[phase6.Output]:
        outputs = step()
        steps.append(len(outputs))
        return outputs

    async def read() -> None:
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe

        def wake(callback: Any, *arguments: Any) -> asyncio.Handle:
            wakes.append(1)
            return call(callback, *arguments)

        monkeypatch.setattr(loop, "call_soon_threadsafe", wake)
        async for _ in engine.generate(list(TEXT), params(12), n=3):
            pass

    monkeypatch.setattr(engine.engine, "step", counted)
    asyncio.run(read())
    assert max(steps) == 3
    assert len(wakes) == len([outputs for outputs in steps if outputs])


def test_new_work_ends_a_call_that_makes_several_steps(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request comes during a call: the call ends after its present step, and no token changes."""
    made, steps, calls = pair("cpp", "plain"), list[int](), list[int]()
    fast = made.llm.backends.fast[made.llm.loaded.model]
    decode = fast.decode
    with AsyncLLMEngine(made.engine(rows=2)) as engine:

        def slow_decode(batch: Any, drafter: Any, counts: list[int], most: int, **how: Any) -> Any:
            calls.append(most)
            if len(calls) == 2:
                arrived.set()  # the other request comes now
                wait_until(lambda: fast._engine.hurried)
            found = decode(batch, drafter, counts, most, **how)
            steps.append(len(found[0]))
            return found

        monkeypatch.setattr(fast, "decode", slow_decode)
        arrived, found = threading.Event(), dict[int, Result]()

        def read(at: int) -> None:
            found[at] = joined(list(engine.stream(list(TEXT[at:]), params(40))))

        threads = [threading.Thread(target=read, args=(at,)) for at in range(2)]
        threads[0].start()
        arrived.wait(timeout=60)
        threads[1].start()
        for thread in threads:
            thread.join()
    assert calls[1] > 8
    assert steps[1] == 1
    assert max(steps[2:]) > 8  # and later calls make several steps again
    assert found == {at: made.alone(asked(TEXT[at:], tokens=40)) for at in range(2)}
    assert not fast._engine.hurried


def test_samples_come_in_one_stream(serving: tuple[Pair, AsyncLLMEngine]) -> None:
    made, engine = serving
    outputs = list(engine.stream(list(TEXT), params(6, temperature=1.0), n=2, policy="coupled", k=3))
    for sample in range(2):
        mine = joined([output for output in outputs if output.sample == sample])
        assert mine == made.alone(asked(tokens=6, temperature=1.0), sample)


def wait_until(met: Callable[[], bool]) -> None:
    for _ in range(12000):
        if met():
            return
        time.sleep(0.005)
    raise AssertionError("nothing happened in 60 s")


def test_a_stream_that_is_left_is_aborted(serving: tuple[Pair, AsyncLLMEngine]) -> None:
    made, engine = serving
    stream = engine.stream(list(TEXT[:8]), params(50))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    wait_until(lambda: not engine.engine.requests and not engine.engine.busy)
    assert isinstance(engine.engine.target, phase6.CachedRunner)
    assert not engine.engine.target.manager.rows
    assert joined(list(engine.stream(list(TEXT), params(4), k=3))) == made.alone(asked(tokens=4))


def test_a_cancelled_task_is_aborted(serving: tuple[Pair, AsyncLLMEngine]) -> None:
    _, engine = serving

    async def cancel() -> None:
        async def read() -> None:
            async for _ in engine.generate(list(TEXT[:8]), params(50)):
                begun.set()

        begun = asyncio.Event()
        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    wait_until(lambda: not engine.engine.requests and not engine.engine.busy)


def test_a_bad_request_gets_its_error_and_the_others_go_on(serving: tuple[Pair, AsyncLLMEngine]) -> None:
    made, engine = serving
    stream = engine.stream(list(TEXT), params(12), k=3)
    first = next(stream)
    for prompt, more, what in (([], {}, "empty"), ([5], {"n": 0}, "n must"), ([10**6], {}, "vocabulary")):
        with pytest.raises(UserError, match=what):
            list(engine.stream(prompt, params(4), **more))
    assert joined([first, *stream]) == made.alone(asked(tokens=12))


def test_an_error_of_the_engine_reaches_everybody(
    serving: tuple[Pair, AsyncLLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that belongs to no request ends all that are there, and later ones are served."""
    made, engine = serving
    scheduler, schedule = engine.engine.scheduler, engine.engine.scheduler.schedule

    def fail() -> Any:
        if not any(sequence.tokens for sequence in scheduler.running):
            return schedule()
        monkeypatch.setattr(scheduler, "schedule", schedule)
        raise RuntimeError("the scheduler failed")

    monkeypatch.setattr(scheduler, "schedule", fail)
    stream = engine.stream(list(TEXT), params(30), k=3)
    assert next(stream).tokens
    with pytest.raises(RuntimeError, match="the scheduler failed"):
        list(stream)
    assert joined(list(engine.stream(list(TEXT), params(4), k=3))) == made.alone(asked(tokens=4))


def test_a_closed_engine_answers_everybody(pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AsyncLLMEngine(pair("torch", "plain").engine(rows=1))
    step = engine.engine.step

    def slow() -> list[phase6.Output]:
        time.sleep(0.1)  # so it is closed before the end
        return step()

    monkeypatch.setattr(engine.engine, "step", slow)
    running, waiting = engine.stream(list(TEXT[:8]), params(50)), engine.stream(list(TEXT), params(50))
    next(running)
    errors = list[UserError]()

    def read() -> None:
        try:
            list(waiting)
        except UserError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    engine.close()
    engine.close()
    reader.join(timeout=60)
    assert not reader.is_alive()
    assert "closed" in str(errors[0])
    with pytest.raises(UserError, match="closed"):
        list(running)
    with pytest.raises(UserError, match="closed"):
        list(engine.stream(list(TEXT), params(4)))
