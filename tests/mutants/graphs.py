"""Mutants of the step on the device, of graphs, of `--deterministic` and of the profiler's clocks."""

from __future__ import annotations

from tests.support.mutants import mutants

PHASE = "phase-6-gpu-streams-graphs/engine"
GRAPHS = ("tests/phase6/test_graphs.py",)
RECORDED = ("tests/phase6/test_recorded.py",)
DETERMINISM = ("tests/phase6/test_determinism.py",)
OVERLAP = ("tests/phase6/test_overlap.py",)
PROFILER = ("tests/phase6/test_profiler.py",)

MUTANTS = [
    *mutants(
        f"{PHASE}/device_step.py",
        GRAPHS,
        ("torch.where(live, lanes.lengths, 1)", "torch.where(live, lanes.lengths, 2)"),
        ("torch.where(live, lanes.tokens, 0)", "lanes.tokens"),
        ("torch.where(live, widths + 1, 0)", "widths + 1"),
        ("lanes.lengths.add_(emitted.int())", "lanes.lengths.add_(1)"),
        ("known.gather(1, accepted[:, None])", "known[:, :1]"),
        ("(lanes.ends - lengths).clamp(max=K)", "lengths.new_full((len(lengths), 1), K)"),
        ("| ~live", ""),
    ),
    *mutants(
        f"{PHASE}/drafters/model_device.py",
        GRAPHS,
        ("out.copy_(torch.where(of_row == number, drawn, out))", "out.copy_(drawn)"),
        ("noise, first=j, out=", "noise, first=0, out="),
    ),
    *mutants(
        f"{PHASE}/graph_steps.py",
        GRAPHS,
        ("((step.target, 1), (step.draft, 2))", "((step.target, 0), (step.draft, 2))"),
        ("((step.target, 1), (step.draft, 2))", "((step.target, 1), (step.draft, 0))"),
        ("lanes.ends[r] = limit(sequence, step.target)", "lanes.ends[r] = 1 << 30"),
        ("[-2:]", "[-1:]"),
    ),
    *mutants(
        f"{PHASE}/graphs.py",
        GRAPHS,
        ('mode == "on" and why_not is not None', 'mode == "on" and why_not is None'),
        ('options.kv not in ("static", "paged")', 'options.kv == "off"'),
    ),
    *mutants(
        f"{PHASE}/recorded.py",
        RECORDED,
        ("if self.used > self.limit:", "if self.used > self.limit + 4096:"),
        ("0xFF if memory.is_floating_point() else 0xA5", "0xA5"),
        ("self.recording.arguments += map", "_ = map"),
        ("self.device.recording.work.append(work)", "work()"),
        ("if not all(map(self.device.owns, tensors)):", "if False:"),
    ),
    *mutants(
        f"{PHASE}/determinism.py",
        DETERMINISM,
        ("        and options.temperature > 0\n", ""),
        ('EXACT = ("coupled", "longest_prefix")', 'EXACT = ("coupled", "longest_prefix", "rejection")'),
        ("torch.set_deterministic_debug_mode(before)", "pass"),
    ),
    *mutants(
        f"{PHASE}/overlap.py",
        OVERLAP,
        ("ahead.output == sequence.tokens and ", ""),
        (
            "guess, *tokens = made.tokens[row, : width + 1].tolist()",
            "*tokens, guess = made.tokens[row, : width + 1].tolist()",
        ),
        ("made.probs[row, 1 : width + 1]", "made.probs[row, :width]"),
        ("self.stats.used += sum(ahead is not None for ahead in found)", "self.stats.used += len(found)"),
    ),
    *mutants(
        f"{PHASE}/options.py",
        DETERMINISM,
        ('"coupled" if self.deterministic and self.controller == "cost" else', '"coupled" if self.deterministic else'),
    ),
    *mutants(
        f"{PHASE}/profiler.py",
        PROFILER,
        ("        self.clock.settle()\n", ""),
        ('self.enter("schedule")', 'self.enter("")'),
    ),
]
