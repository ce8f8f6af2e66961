"""The command line: reads prompts, streams text to stdout, prints one summary line to stderr (or one JSON document)."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from common.device import dtype_name, resolve_device
from common.errors import UserError
from common.options import parse_options
from common.phases import phase_of
from common.streams import say

from .determinism import why_not_reproducible
from .explain import account, plain_step_ms, print_explanation
from .generate import stats_of
from .llm import LLM
from .options import Options
from .parallel.start import RankLost, by_torchrun
from .parallel.worker import run as run_rank
from .profiler import Profiler
from .record import Recorder
from .sequence import Sequence
from .show import Show, print_tree

PHASE = phase_of(__file__)


def read_prompts(options: Options) -> list[str]:
    """Return the prompts of the command line, else all of stdin. UserError if there is none or one is empty."""
    prompts = list(options.prompt)
    if options.prompt_file:
        try:
            prompts.append(options.prompt_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt-file {options.prompt_file}: cannot be read as text ({error})") from None
    if not prompts:
        if sys.stdin is None or sys.stdin.closed:
            raise UserError("no prompt: stdin is closed; give --prompt TEXT or --prompt-file FILE")
        if sys.stdin.isatty():
            print("reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
        try:
            prompts.append(sys.stdin.read())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"stdin cannot be read as text ({error}); expected UTF-8") from None
    if not all(prompts):
        raise UserError("the prompt is empty: give --prompt TEXT, --prompt-file FILE, or text on stdin")
    return prompts


class Printer:
    """Prints completions in order, each while it is decoded; later ones wait for their turn."""

    def __init__(self, sequences: list[Sequence], quiet: bool) -> None:
        self.waiting = [] if quiet else list(enumerate(sequences, start=1))
        self.headed = len(sequences) > 1
        self.titled = 0

    def update(self, interrupted: bool = False) -> None:
        """Print all text that can no longer change. `interrupted`: print every completion as far as it got."""
        while self.waiting:
            number, sequence = self.waiting[0]
            if self.headed and self.titled < number:
                print(f"--- completion {number} ---")
                self.titled = number
            print(sequence.take_text(), end="", flush=True)
            if sequence.finish_reason is None and not interrupted:
                return
            print(flush=True)
            self.waiting.pop(0)


def report(llm: LLM, sequences: list[Sequence]) -> dict[str, object]:
    """Return the document of `--json`. An interrupted completion keeps its tokens and is marked."""
    completions = [
        {
            "prompt_tokens": sequence.prompt,
            "tokens": sequence.tokens,
            "text": sequence.text,
            "finish_reason": sequence.finish_reason or "interrupted",
            "stats": completion_stats(llm, sequence) if sequence.tokens else {},
            **({"error": sequence.refusal} if sequence.refusal else {}),
        }
        for sequence in sequences
    ]
    settings = llm.options.model_dump(mode="json", by_alias=True)
    return {
        "phase": PHASE,
        "model": llm.loaded.checkpoint.name,
        "settings": settings,
        "precision": {name: each.as_json() for name, each in llm.precision.items()},
        "completions": completions,
        "kv": llm.remembered(),
        "kernels": llm.backends.report,
        "cuda_graph": llm.backends.graph_stats(),
        "parallel_streams": dataclasses.asdict(llm.overlap) if llm.overlap else None,
        "why_not_reproducible": why_not_reproducible(llm),
        "tokenizer_cache": dataclasses.asdict(llm.encoder.stats),
        "compile": llm.compiler.as_json() if llm.compiler else None,
    }


def completion_stats(llm: LLM, sequence: Sequence) -> dict[str, object]:
    """Return the figures of plain decoding, and the counts of draft tokens."""
    steps = sequence.steps
    proposed, accepted = sum(step.proposed for step in steps), sum(step.accepted for step in steps)
    stats = {
        **dataclasses.asdict(stats_of(sequence)),
        "draft": llm.draft_name,
        "proposed": proposed,
        "accepted": accepted,
        "acceptance": accepted / proposed if proposed else None,
    }
    if llm.options.metrics_detailed:
        stats["per_step"] = [dataclasses.asdict(step) for step in steps]
    return stats


def explain(llm: LLM, sequences: list[Sequence]) -> None:
    """Decode a few tokens of the first prompt without the draft, to measure a plain step; then print the account."""
    if not llm.speculative:
        print("nothing to explain: there is no draft (--draft NAME)", file=sys.stderr)
        return
    sequence = sequences[0]
    longest = len(sequence.prompt) + sequence.params.max_new_tokens
    with llm.computing():
        plain_ms = plain_step_ms(llm.make_runner(llm.loaded.model, 1, longest), sequence)
    costs = account(sequence.steps, plain_ms)
    if costs is None:
        print("nothing to explain: no step drafted a token", file=sys.stderr)
        return
    plain_total = costs.plain_ms * len(sequence.tokens)
    print_explanation(costs, plain_total / stats_of(sequence).total_ms)


def summary(llm: LLM, sequences: list[Sequence]) -> str:
    """Return one line for people: tokens, time, rate, model, dtype, device."""
    stats = [stats_of(sequence) for sequence in sequences if sequence.tokens]
    if not stats:
        return "no tokens"
    tokens, seconds = sum(s.new_tokens for s in stats), max(s.total_ms for s in stats) / 1e3
    first = min(s.ttft_ms for s in stats)
    weight, name = llm.loaded.model.embedding.weight, llm.loaded.checkpoint.name
    precision = llm.precision.get(name, dtype_name(weight.dtype))
    return (
        f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s, first after {first:.0f} ms "
        f"({name}, {precision}, {weight.device})"
    )


def warn_about_length(llm: LLM, sequences: list[Sequence]) -> None:
    context = llm.loaded.config.context
    if any(sequence.length > context for sequence in sequences):
        print(
            f"note: a prompt is longer than the context of {context} tokens; the model sees its last part, "
            "in a window that jumps ahead by a quarter of the context",
            file=sys.stderr,
        )


def warn_about_white_space(llm: LLM, texts: list[str]) -> None:
    if any(llm.loaded.tokenizer.joins_next(text) for text in texts):
        print(
            "note: a prompt ends in white space, which this tokenizer joins to the next word; the model goes on better "
            "without it",
            file=sys.stderr,
        )


def main(arguments: list[str]) -> int:
    options = parse_options(Options, arguments, program=Path(sys.argv[0]).name)
    if (place := by_torchrun()) is not None and place.rank > 0:
        return run_rank(options, place)
    texts = read_prompts(options)
    try:
        return profiled(options, texts)
    except RankLost as error:
        say(f"error: {error}")
        return 1


def profiled(options: Options, texts: list[str]) -> int:
    """Run, with a profile if the options want one."""
    if options.profile is None:
        return run(options, texts, None)
    device = resolve_device(options.device)
    with Profiler(options.profile, device, options.profile_steps, options.profile_stacks) as profiler:
        status = run(options, texts, profiler)
    print(profiler.report(), file=sys.stderr)
    return status


def run(options: Options, texts: list[str], profiler: Profiler | None) -> int:
    llm = LLM(options)
    sequences = llm.sequences(texts)
    warn_about_length(llm, sequences)
    warn_about_white_space(llm, texts)
    drafts = llm.speculative and options.beams == 1
    if options.show and not drafts:
        print("note: --show has nothing to mark: no token of this run is drafted", file=sys.stderr)
    show = Show(llm.loaded.tokenizer) if options.show and drafts else None
    printer = Printer(sequences, quiet=options.as_json or show is not None)
    recorder = Recorder(options.record, llm, sequences) if options.record else None
    if recorder and llm.backends.multi_step is not None:
        print("note: --record takes steps one at a time; without it several run in one call", file=sys.stderr)
    interrupted = False
    try:
        steps = llm.run(sequences, multi_step=recorder is None)
        for step in profiler.watch(steps) if profiler else steps:
            printer.update()
            if step and show and sequences[0] in step.sequences:
                show.step(step)
            if step and options.show_tree and drafts and sequences[0] in step.sequences:
                print_tree(step, llm.loaded.tokenizer)
            if recorder:
                recorder.step(step)
    except KeyboardInterrupt:
        interrupted = True
        printer.update(interrupted)
        if show:
            print()  # the text ended within a line
    finally:
        if recorder:
            recorder.finish()
    if show:
        show.histogram()
    if options.explain and not interrupted:
        explain(llm, sequences)
    if options.as_json:
        print(json.dumps(report(llm, sequences)))
    elif options.metrics_detailed:
        print(llm.encoder.stats, file=sys.stderr)
    print(summary(llm, sequences) + (", interrupted" if interrupted else ""), file=sys.stderr)
    refused = [(number, each) for number, each in enumerate(sequences, 1) if each.refusal]
    for number, each in refused:
        ended = "failed" if each.error else "was refused"
        print(f"error: completion {number} {ended}: {each.refusal}", file=sys.stderr)
    return 130 if interrupted else 2 if refused else 0
