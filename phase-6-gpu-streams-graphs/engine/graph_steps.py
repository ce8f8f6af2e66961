"""Makes several steps of a batch on the device, in one call: the host looks at each step while the next one runs.

One upload sets the lanes, every step is one replay of a graph, and one small copy tells what became of it. So the host
sees the end of a text one step late, and drops what that lane gained since. It is the counterpart of multi_step.py,
which makes several steps in C++.

    python generate.py --device cuda --cuda-graph on --prompt "from pathlib import"
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from .controllers import FixedController, observe
from .device_runner import DeviceRunner
from .device_step import Bucket, DeviceStep, Lanes, Result, capacity
from .drafters.model_device import DeviceModelDrafter
from .drafting import Draft, Drafter, Outcome
from .graphs import Device, Graph, GraphStats
from .kernels.key_ranges import FEW
from .kv_cache import KVCache, PagedCache
from .policies import Rejection, SampleMatch
from .profiler import stage
from .runner import NO_DRAFT, ModelRunner
from .sampling import not_finite
from .sequence import Sequence
from .steps import Path, Step, StepTimes, step_stats
from .tree import Tree
from .verify import RandomSource

AT_ONCE = 16  # steps of a call; their text is shown when it returns
NOTHING = Draft.nothing(0)  # a graph keeps no distributions


class GraphSteps:
    """A `MultiStep` for models on a device. A graph is captured when its bucket is first needed."""

    def __init__(self, device: Device) -> None:
        self.device, self.stats = device, GraphStats()
        self.caches: list[KVCache] = []  # of the graphs
        self.made: dict[Bucket, tuple[DeviceStep, Graph]] = {}

    def __call__(
        self,
        runner: ModelRunner,
        drafter: Drafter | None,
        sequences: list[Sequence],
        asked: list[int],
        source: RandomSource,
        most: int,
    ) -> list[Step]:
        """Make at most so many steps; none where one must be made eagerly, and the stats say why."""
        began = time.perf_counter()
        reason = why_eager(runner, drafter, sequences, any(asked))
        if reason is None:
            runners = [cast(DeviceRunner, runner)]
            if isinstance(drafter, DeviceModelDrafter):
                runners.append(drafter.runner)
            controller, greedy = sequences[0].controller, all(sequence.params.greedy for sequence in sequences)
            K = controller.k if any(asked) and isinstance(controller, FixedController) else 0
            steps = reserve(runners if K else runners[:1], sequences, K, most)
            if steps:
                rows = rows_of_bucket(len(sequences), len(runners[0].manager.cache.lengths))
                policies = {each.policy for each in sequences if K and not each.params.greedy}
                reads = self.device.reads
                step, graph = self._graph(runners, Bucket(rows, K, greedy, tuple(sorted(policies, key=repr))))
                self.device.copy_in(step.memory, loaded(step, sequences))
                self.stats.uploads += 1
                made = self._run(step, graph, sequences, asked, steps, began)
                settle(step, sequences)
                if drafter is not None:
                    drafter.observe(Outcome(sequences, [0] * len(sequences), None))
                self.stats.host_reads += self.device.reads - reads
                return made
            reason = "the cache has no room"
        self.stats.eager_steps[reason] += 1
        return []

    def _graph(self, runners: list[DeviceRunner], bucket: Bucket) -> tuple[DeviceStep, Graph]:
        caches = [runner.manager.cache for runner in runners]
        if caches != self.caches[: len(caches)]:  # the graphs hold addresses of others
            self.made, self.caches = {}, caches
            for runner in runners:  # tables that grow would move
                if runner.model.config.positions == "rope":
                    runner.model.rotation_of(range(capacity(runner.manager.cache)), runner.model.embedding.weight)
            self.device.adopt([runner.model for runner in runners], caches)
        if bucket not in self.made:
            step = DeviceStep(runners[0], runners[1] if len(runners) > 1 else None, bucket, self.device)
            self.made[bucket] = step, self.device.capture(step.step)
            self.stats.captures += 1
        return self.made[bucket]

    def _run(
        self, step: DeviceStep, graph: Graph, sequences: list[Sequence], asked: list[int], steps: int, began: float
    ) -> list[Step]:
        """Launch the steps, and read each while the next one runs. Nothing is launched after an end was seen."""
        waiting, made, launched, ended = deque[Callable[[], list[int]]](), list[Step](), 0, False
        stage("verify")
        while waiting or not ended:
            if not ended:
                waiting.append(self.device.copy_out(graph.replay()))
                launched += 1
                if launched < steps and len(waiting) == 1:
                    continue
            results = step.results(waiting.popleft()())[: len(sequences)]
            if not all(result.finite for result in results):
                raise not_finite(step.target.model.embedding.weight.dtype)
            now = time.perf_counter()
            if any(sequence.finish_reason is None for sequence in sequences):
                made.append(commit(sequences, asked, results, now - began))
            began = now
            stopped = any(each.finish_reason or not of.emitted for each, of in zip(sequences, results, strict=True))
            ended = ended or launched == steps or stopped
        self.stats.replays += launched
        return made


def why_eager(
    runner: ModelRunner,
    drafter: Drafter | None,
    sequences: list[Sequence],
    drafts: bool,
) -> str | None:
    """Return why the next step of these sequences must be made eagerly; None if it need not."""
    if not isinstance(runner, DeviceRunner):
        return "the target does not run on the device"
    if any(sequence.params.penalised for sequence in sequences):
        return "a penalty counts tokens on the host"
    if any(sequence.length > limit(sequence, runner) for sequence in sequences):
        return "past the model's context"
    if any(lacking(runner, sequence) != 1 for sequence in sequences):
        return "a prompt"
    if not drafts:
        return None
    if not isinstance(drafter, DeviceModelDrafter):
        return "the drafter drafts on the host"
    if others := [each.policy for each in sequences if not isinstance(each.policy, Rejection | SampleMatch)]:
        return f"the policy {type(others[0]).__name__} reads the host"
    widths = {each.controller.k for each in sequences if isinstance(each.controller, FixedController)}
    if len(widths) != 1 or not all(isinstance(each.controller, FixedController) for each in sequences):
        return "controllers decide on the host"
    if max(widths) >= FEW:
        return f"drafts of more than {FEW - 1} tokens"
    if any(lacking(drafter.runner, sequence) > 2 for sequence in sequences):
        return "a prompt"
    return None


def limit(sequence: Sequence, runner: DeviceRunner) -> int:
    """Return the length up to which a step may begin: the token limit, or the end of the first window."""
    return min(len(sequence.prompt) + sequence.params.max_new_tokens - 1, runner.model.config.context)


def lacking(runner: DeviceRunner, sequence: Sequence) -> int:
    """Return how many tokens of a sequence its row lacks, after entries of rejected tokens were dropped."""
    text = sequence.prompt + sequence.tokens
    return len(text) - (len(runner.manager.begin(sequence, text).held) if sequence in runner.manager.rows else 0)


def rows_of_bucket(sequences: int, most: int) -> int:
    """Return the next power of two, at most the rows of the cache."""
    return min(1 << (sequences - 1).bit_length(), most)


def reserve(runners: list[DeviceRunner], sequences: list[Sequence], K: int, most: int) -> int:
    """Return for how many steps of K draft tokens the caches have room, and reserve it; 0 for none."""
    left = max(limit(sequence, runners[0]) + 1 - sequence.length for sequence in sequences)
    waits = not all(sequence.tokens for sequence in sequences)  # a sequence waits for its first token
    for steps in (1 if waits else min(most, AT_ONCE, left), 1):
        ends = [min(each.length + steps * (K + 1), limit(each, runners[0])) for each in sequences]
        if all(r.manager.reserve(each, end) for r in runners for each, end in zip(sequences, ends, strict=True)):
            return steps
    return 0


def loaded(step: DeviceStep, sequences: list[Sequence]) -> Tensor:
    """Return the lanes of these sequences as bytes; lanes beyond them are not live."""
    R = step.bucket.rows
    memory = torch.zeros(len(step.memory), dtype=torch.uint8)
    lanes = Lanes.on(memory, R, step.fields)
    for r, sequence in enumerate(sequences):
        lanes.filters[r] = torch.tensor(sequence.params.filters, dtype=torch.float64)
        lanes.keys[r] = torch.tensor(sequence.key)
        lanes.lengths[r], lanes.live[r] = sequence.length, 1
        if sequence.policy in step.bucket.policies:  # a greedy sequence accepts the same tokens by every policy
            lanes.rules[r] = step.bucket.policies.index(sequence.policy)
        lanes.ends[r] = limit(sequence, step.target)
        lanes.tokens[r] = torch.tensor((sequence.prompt + sequence.tokens)[-2:])
        for runner, where in ((step.target, lanes.target), (step.draft, lanes.draft)):
            if runner is not None:
                number, cache = runner.manager.rows[sequence].number, runner.manager.cache
                row = [number, *(cache.tables[number] if isinstance(cache, PagedCache) else [])]
                where[r, : len(row)] = torch.tensor(row)
    return memory


def commit(sequences: list[Sequence], asked: list[int], results: list[Result], seconds: float) -> Step:
    """Give the sequences the tokens of a step; those that have ended gain nothing."""
    done = Step([], [], NOTHING, [], None, [], [])
    for sequence, k, result in zip(sequences, asked, results, strict=True):
        if sequence.finish_reason is not None or not result.emitted:
            continue
        start, tree = len(sequence.tokens), Tree.chain(result.draft[: result.width]) if result.width else NO_DRAFT
        path = Path(list(range(result.emitted - 1)), result.following)
        for token in result.tokens:
            sequence.append(token)
        done.sequences.append(sequence)
        done.starts.append(start)
        done.trees.append(tree)
        done.paths.append(path)
        times = StepTimes(0.0, seconds, 0.0)  # the host does not see the parts of a graph
        done.stats.append(step_stats(sequence, k, start, tree, path, result.width + 1, 1, times))
    observe([sequence.controller for sequence in done.sequences], done.stats)
    return done


def settle(step: DeviceStep, sequences: list[Sequence]) -> None:
    """Record what the caches hold after a call, and release the rows of sequences that have ended.

    The draft's cache may lack the token before the last: it was accepted, and not computed.
    """
    for runner, behind in ((step.target, 1), (step.draft, 2)):
        if runner is None:
            continue
        for sequence in sequences:
            row, text = runner.manager.rows[sequence], sequence.prompt + sequence.tokens
            runner.manager.appended(row, text[len(row.held) : max(len(row.held), len(text) - behind)])
    for sequence in sequences:
        if sequence.finish_reason is not None:
            step.target.release(sequence)
