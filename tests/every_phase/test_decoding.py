"""Plain decoding: batches, stop strings, the end of a text, and the window past the context."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import AutoModelForCausalLM

from common.errors import UserError
from common.tokenizer import Tokenizer

pytestmark = pytest.mark.newest

CPU = torch.device("cpu")


@pytest.fixture
def loaded(engine: ModuleType, llama_folder: Path) -> Any:
    return engine.load(str(llama_folder), torch.float32, CPU)


def tokens_of(engine: ModuleType, loaded: Any, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    done = engine.generate(loaded.model, prompts, engine.SamplingParams(**params), loaded.ending)
    return [generation.tokens for generation in done]


PROMPTS = [[5, 9, 200], [17] * 11, [40], [7, 80, 3, 3, 150, 21, 9], [300, 2, 2, 44]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_ragged_batch_equals_its_rows_alone(engine: ModuleType, loaded: Any, temperature: float) -> None:
    settings = {"temperature": temperature, "max_new_tokens": 24, "seed": 3}
    together = tokens_of(engine, loaded, PROMPTS, **settings)
    alone = [tokens_of(engine, loaded, [prompt], **settings)[0] for prompt in PROMPTS]
    assert together == alone


def test_rows_end_each_on_its_own(engine: ModuleType, loaded: Any) -> None:
    """With half of the vocabulary ending the text, rows end at different steps; each is cut right after its end."""
    ending = engine.Ending(eos_ids=tuple(range(0, 320, 4)))
    params = engine.SamplingParams(temperature=1.0, max_new_tokens=40)
    done = engine.generate(loaded.model, PROMPTS, params, ending)
    assert len({len(generation.tokens) for generation in done}) > 1
    for generation in done:
        assert generation.finish_reason == "eos"
        assert generation.tokens[-1] % 4 == 0
        assert all(token % 4 for token in generation.tokens[:-1])


def test_the_logits_of_every_step_can_be_seen(engine: ModuleType, loaded: Any) -> None:
    params = engine.SamplingParams(max_new_tokens=5, ignore_eos=True)
    sequences = [engine.Sequence(prompt, params, loaded.ending) for prompt in PROMPTS[:2]]
    runs = loaded.model
    if hasattr(engine, "make_runner"):
        runs = engine.make_runner(loaded.model, engine.KVOptions(), 2, 32)
    seen: list[tuple[list[int], list[int]]] = []

    def watch(active: list[Any], logits: torch.Tensor) -> None:
        seen.append((logits.argmax(-1).tolist(), [sequence.tokens[-1] for sequence in active]))

    if hasattr(engine, "TargetOutput"):  # from phase 3 on a step holds the logits
        for step in engine.decode(runs, None, sequences):
            watch(step.sequences, step.output.logits[:, 0])
    else:
        assert sum(1 for _ in engine.decode(runs, sequences, watch=watch)) == 5
    assert len(seen) == 5
    assert all(likeliest == taken for likeliest, taken in seen)


def test_samples_of_one_prompt_differ_and_do_not_depend_on_each_other(engine: ModuleType, loaded: Any) -> None:
    params = engine.SamplingParams(temperature=1.0, max_new_tokens=12)
    three = engine.generate(loaded.model, [PROMPTS[0]] * 3, params, loaded.ending, samples=[0, 1, 2])
    assert len({tuple(generation.tokens) for generation in three}) == 3
    second = engine.generate(loaded.model, [PROMPTS[0]], params, loaded.ending, samples=[1])
    assert second[0].tokens == three[1].tokens


def test_stream_gives_the_same_tokens(engine: ModuleType, loaded: Any) -> None:
    params = engine.SamplingParams(temperature=1.0, max_new_tokens=12)
    assert (
        list(engine.stream(loaded.model, PROMPTS[0], params))
        == tokens_of(engine, loaded, [PROMPTS[0]], temperature=1.0, max_new_tokens=12)[0]
    )


def test_eos_can_be_ignored(engine: ModuleType, loaded: Any) -> None:
    everything = engine.Ending(eos_ids=tuple(range(320)))
    params = engine.SamplingParams(max_new_tokens=5)
    assert engine.generate(loaded.model, [[5]], params, everything)[0].finish_reason == "eos"
    params = engine.SamplingParams(max_new_tokens=5, ignore_eos=True)
    assert len(engine.generate(loaded.model, [[5]], params, everything)[0].tokens) == 5


class Fed:
    """A sequence that receives given text, one token at a time, as from a decoding loop."""

    def __init__(self, engine: ModuleType, loaded: Any, stop: tuple[str, ...], limit: int = 100) -> None:
        params = engine.SamplingParams(stop=stop, max_new_tokens=limit)
        self.sequence = engine.Sequence([1], params, loaded.ending)
        self.tokenizer = loaded.tokenizer

    def feed(self, text: str) -> str:
        shown = ""
        for token in self.tokenizer.encode(text):
            more = self.sequence.append(token)
            shown += self.sequence.take_text()
            if not more:
                break
        return shown


def test_a_stop_string_cuts_the_text_and_is_not_shown(engine: ModuleType, loaded: Any) -> None:
    fed = Fed(engine, loaded, ("return",))
    assert fed.feed("def f(): return 1") == "def f(): "
    assert fed.sequence.finish_reason == "stop"
    assert fed.sequence.text == "def f(): "


def test_a_stop_string_may_span_tokens(engine: ModuleType, loaded: Any) -> None:
    stop = "xyzzy plugh"
    assert len(loaded.tokenizer.encode(stop)) > 2
    fed = Fed(engine, loaded, (stop,))
    assert fed.feed(f"say {stop} twice") == "say "
    assert fed.sequence.finish_reason == "stop"


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_is_clear(engine: ModuleType, loaded: Any) -> None:
    fed = Fed(engine, loaded, ("abcabd",))
    assert fed.feed("abcab") == ""
    assert fed.feed("cabx") == "abcabcabx"
    assert fed.feed("abcab") == ""
    assert fed.feed("d") == ""
    assert fed.sequence.text == "abcabcabx"


def test_the_earliest_of_several_stop_strings_counts(engine: ModuleType, loaded: Any) -> None:
    fed = Fed(engine, loaded, ("three", "two"))
    assert fed.feed("one two three") == "one "


def test_held_back_text_is_shown_when_the_limit_ends_it(engine: ModuleType, loaded: Any) -> None:
    tokens = len(loaded.tokenizer.encode("abc"))
    fed = Fed(engine, loaded, ("abcd",), limit=tokens)
    assert fed.feed("abc") == "abc"
    assert fed.sequence.finish_reason == "length"


def test_the_first_space_of_an_output_is_kept(engine: ModuleType) -> None:
    """A sentencepiece decoder drops the space before the first token of a text, but an output is not the first text."""
    words = ["▁France", "▁is", "▁Paris", ",", "▁the", "▁city"]
    backend = Backend(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token=","))
    backend.decoder = decoders.Metaspace()
    ending = engine.Ending((), Tokenizer(backend, None, ()))
    for stop, text, reason in (
        ((), " Paris, the city", "length"),
        ((" Paris",), "", "stop"),
        ((" the",), " Paris,", "stop"),
    ):
        sequence = engine.Sequence([0, 1], engine.SamplingParams(stop=stop, max_new_tokens=4), ending)
        streamed = ""
        for token in (2, 3, 4, 5):
            sequence.append(token)
            streamed += sequence.take_text()
        assert (sequence.text, streamed, sequence.finish_reason) == (text, text, reason)


def test_stop_strings_need_a_tokenizer(engine: ModuleType) -> None:
    with pytest.raises(UserError, match="tokenizer"):
        engine.Sequence([1], engine.SamplingParams(stop=("x",)), engine.Ending())
    with pytest.raises(UserError, match="empty"):
        engine.Sequence([], engine.SamplingParams(), engine.Ending())


@pytest.mark.modules("context.py")
def test_window_start_jumps_by_a_quarter(engine: ModuleType) -> None:
    starts = [engine.window_start(length, 32) for length in range(70)]
    assert starts[:33] == [0] * 33
    assert starts[33:41] == [8] * 8
    assert starts[41:49] == [16] * 8
    assert starts[69] == 40
    assert all(length - start <= 32 for length, start in enumerate(starts))


@pytest.mark.covering(1)
@pytest.mark.parametrize("count", [100, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_past_the_context_equals_a_crop_by_hand(
    engine: ModuleType, make_checkpoint: Callable[..., Path], family: str, count: int
) -> None:
    """Generate `count` new tokens with a context of 32, and compare with transformers on windows cut by hand."""
    size = {"n_positions": 32} if family == "gpt2" else {"max_position_embeddings": 32}
    folder = make_checkpoint(family, **size)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    loaded = engine.load(str(folder), torch.float32, CPU)
    prompt = list(range(1, 40))  # already longer than the context
    got = tokens_of(engine, loaded, [prompt], max_new_tokens=count)[0]
    text, start = list(prompt), 0
    for token in got:
        while len(text) - start > 32:
            start += 8
        with torch.no_grad():
            logits = reference(torch.tensor([text[start:]]), use_cache=False).logits[0, -1]
        # The first of two equal logits may differ, so the chosen logits are compared, not the tokens.
        assert logits[token] >= logits.max() - 1e-4
        text.append(token)
        if token == 0:
            break
    assert len(got) == count or got[-1] == 0


@pytest.mark.modules("beam.py")
@pytest.mark.parametrize("length_penalty", [1.0, 2.0, -1.0])
def test_beam_search_equals_transformers(engine: ModuleType, loaded: Any, length_penalty: float) -> None:
    """Four beams. EOS is made likely, so that hypotheses of different lengths compete."""
    reference = AutoModelForCausalLM.from_pretrained(loaded.checkpoint.folder, dtype=torch.float32).eval()
    eos = list(range(0, 320, 20))
    lengths = set()
    for prompt in PROMPTS:
        expected = reference.generate(
            torch.tensor([prompt]), num_beams=4, do_sample=False, max_new_tokens=12, length_penalty=length_penalty,
            eos_token_id=eos, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        params = engine.SamplingParams(max_new_tokens=12)
        best = engine.beam_search(loaded.model, prompt, params, engine.Ending(tuple(eos)), 4, length_penalty)
        assert best.tokens == expected
        lengths.add(len(expected))
    assert len(lengths) > 1 or length_penalty != 1.0


def test_only_rows_of_similar_length_share_a_forward(engine: ModuleType) -> None:
    group = importlib.import_module(engine.next_logits.__module__).of_similar_length
    assert group([10, 10, 10]) == [[0, 1, 2]]
    assert group([200, 10, 11]) == [[1, 2], [0]]
    for lengths in ([5], [16, 200, 17, 190, 60, 64], list(range(1, 60))):
        groups = group(lengths)
        assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
        for rows in groups:
            real = sum(lengths[r] for r in rows)
            assert max(lengths[r] for r in rows) * len(rows) - real <= real // 4 + 64


def test_a_session_completes_texts(engine: ModuleType, llama_folder: Path, loaded: Any) -> None:
    """Greedy, sampled twice, and with beams, as from the command line."""
    model = str(llama_folder)
    greedy = engine.LLM(engine.Options(model=model, max_tokens=6)).generate(["import os", "x"])
    prompts = [loaded.tokenizer.encode(text) for text in ("import os", "x")]
    assert [g.tokens for g in greedy] == tokens_of(engine, loaded, prompts, max_new_tokens=6)
    assert greedy[0].text == loaded.tokenizer.decode(greedy[0].tokens)
    two = engine.LLM(engine.Options(model=model, max_tokens=6, n=2, temperature=1.0)).generate(["x"])
    assert two[0].tokens != two[1].tokens
    best = engine.LLM(engine.Options(model=model, max_tokens=6, beams=3)).generate(["x"])[0]
    params = engine.SamplingParams(max_new_tokens=6)
    assert best.tokens == engine.beam_search(loaded.model, prompts[1], params, loaded.ending, 3).tokens
    assert best.stats.target_forwards >= best.stats.new_tokens


@pytest.mark.modules("cost.py", "config.py")
def test_the_cost_on_paper(engine: ModuleType) -> None:
    """stdlib-10m by hand: 9.44M weights in the layers, two operations for each weight and token."""
    cost = importlib.import_module(f"{engine.__name__}.cost")
    config = engine.load("stdlib-10m", torch.float32, CPU).config
    layer = 384 * (384 + 128 + 128 + 384) + 3 * 384 * 1024
    assert cost.layer_parameters(config) == layer
    assert cost.weight_bytes(config, 2) == 2 * (6 * layer + 384 * 4096)
    everywhere = cost.forward_flops(config, 100, wanted=100)
    assert everywhere == 100 * (2 * 6 * layer + 6 * 4 * 384 * 100 + 2 * 384 * 4096)
    assert cost.forward_flops(config, 100, wanted=1) < 0.9 * everywhere
    assert cost.forward_bytes(config, 4, 100, 4) > 4 * 100 * 384 * 4
