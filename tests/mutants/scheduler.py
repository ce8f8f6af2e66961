"""Phase 6: which sequences run, who holds which block, and whose tokens come out."""
# ruff: noqa: E501

from __future__ import annotations

from tests.support.mutants import mutants

ENGINE = "phase-6-gpu-streams-graphs/engine"
BLOCKS = ("tests/phase6/test_block_manager.py",)
SERVED = (
    "tests/phase6/test_llm_engine.py",
    "tests/phase6/test_schedules.py",
    "-k",
    "not eagle and not medusa and not ngram and not tree",
)
HEADS = ("tests/phase6/test_schedules.py", "-k", "medusa or eagle")

BLOCK_MANAGER = mutants(
    f"{ENGINE}/kv_cache/block_manager.py",
    BLOCKS,
    ("hashlib.blake2b(before + array", "hashlib.blake2b(array"),
    ("        if not self.users[block]:\n            raise ValueError(f\"block {block} is free already\")\n", ""),
    ("block = next(iter(self.cached))", "block = next(reversed(self.cached))"),
    ("            self.forget(block)\n        self.users[block] = 1", "        self.users[block] = 1"),
    ("            del self.cached[block]\n        self.users[block] += 1", "            pass\n        self.users[block] += 1"),
    ("if name not in self.named:\n            self.names[block]", "if True:\n            self.names[block]"),
    ("for start in range(0, len(tokens) - size + 1, size):", "for start in range(0, len(tokens) - size, size):"),
    ("if (name := self.names.pop(block, None)) is not None:\n            del self.named[name]", "self.names.pop(block, None)"),
)  # fmt: skip

PAGES = (
    *mutants(
        f"{ENGINE}/kv_cache/paged.py",
        BLOCKS,
        ("if blocks.users[table[at]] > 1]", "if blocks.users[table[at]] > 2]"),
        ("                storage.move(table[at], mine)", "                pass"),
        ("            blocks.forget(table[at])\n        while", "            pass\n        while"),
        ("            blocks.release(table[at])\n            table[at] = mine", "            table[at] = mine"),
        ("            self.blocks.share(page)\n        self.tables[row], self", "            pass\n        self.tables[row], self"),
    ),
    *mutants(
        f"{ENGINE}/kv_cache/manager.py",
        BLOCKS,
        ("self._borrow(row, window[:-1][:most])", "self._borrow(row, window[:most])", "begin cuts the row right afterwards"),
        ("lacking + sum(min(count, cache.blocks.users[block] - 1)", "lacking + sum(min(count, cache.blocks.users[block])"),
        ("lacking + sum(min(count, cache.blocks.users[block] - 1)", "lacking + sum(cache.blocks.users[block] - 1"),
        ("lacking + sum(min(count, cache.blocks.users[block] - 1)", "0 * sum(min(count, cache.blocks.users[block] - 1)"),
        ("del row.held[length:], row.names[length // PAGE :]", "del row.held[length:]"),
        ("block_name(row.names[-1] if row.names else b\"\", row.held[end - PAGE : end])", "block_name(b\"\", row.held[end - PAGE : end])"),
        ("<= len(row.held):\n            name", "<= len(row.held) + 1:\n            name"),
    ),
)  # fmt: skip

SCHEDULER = mutants(
    f"{ENGINE}/scheduler.py",
    SERVED,
    ("self.waiting.appendleft(sequence)", "self.waiting.append(sequence)"),
    ("youngest = self.running[-1]", "youngest = self.running[0]"),
    ("        for runner in (self.target, self.draft):\n            if runner is not None:", "        for runner in (self.target,):\n            if runner is not None:"),
    ("left if chunks else max(left, BLOCK)", "left"),
    ("return max(0, min(sequence.reach, remaining - 1, self.context - length))", "return sequence.reach"),
    ("                self._begin_rows(sequence)  # after a jump of the window\n", ""),
    ("                    left -= count\n", ""),
    ("self._reserve(sequence, None if last else count)", "self._reserve(sequence, count)"),
    ("len(self.running) < self.rows and self._enter", "len(self.running) <= self.rows and self._enter"),
    ("        sequence.progress.preemptions += 1\n", ""),
    ("if self.running and runner.manager.lacking_blocks(lengths) > runner.manager.free_blocks:", "if False:"),
    ("for each in (*self.running, sequence) if runner in self._runners(each)]", "for each in (*self.running, sequence)]"),
    ("self._length(each) + max(1, self._ahead(each, self._length(each))) for", "self._length(each) + 1 for"),
    ("return shared - (other.length - self.target.missing(other, other.length)) >= BLOCK", "return False"),
)  # fmt: skip

SERVING = (
    *mutants(
        f"{ENGINE}/llm_engine.py",
        SERVED,
        ("            if len(group) == 1:\n                self._fail(group[0], error)\n            else:", "            if True:\n                for sequence in group:\n                    self._fail(sequence, error)\n            else:"),
        (" and not isinstance(sequence.controller, CostController):", ":"),
        ("llm.loaded.ending, sample) for sample in range(n)]", "llm.loaded.ending, 0) for sample in range(n)]"),
        ("            if sequence.finish_reason is not None and sequence in self.scheduler.running:\n                self.scheduler.remove(sequence)", "            pass"),
    ),
    *mutants(
        f"{ENGINE}/capacity.py",
        SERVED,
        ("    length += sequence.reach if sequence.branches else 0\n", "    length += 16\n"),
    ),
    *mutants(
        f"{ENGINE}/runner.py",
        SERVED,
        ("held = 0 if row is None or row.start != start else len(row.held)", "held = 0 if row is None else len(row.held)"),
    ),
    *mutants(
        f"{ENGINE}/runner.py",
        HEADS,
        ("            work.row.states = []\n", "", "the next step wants no states before its own"),
        ("row = self.manager.begin(owner, window, most=first)", "row = self.manager.begin(owner, window)"),
        ("row.states += self._prefill", "row.states = self._prefill"),
    ),
    *mutants(f"{ENGINE}/cpp_runner.py", HEADS, ("            work.row.states = []\n", "")),
    *mutants(
        f"{ENGINE}/multi_step.py",
        HEADS,
        ("range(at + skip[row], ", "range(at, "),
        ("prefill = [work.states for work in works]", "prefill = [[] for work in works]"),
    ),
)  # fmt: skip

OF_EACH = ("tests/phase6/test_llm_engine.py", "-k", "policies")
POLICIES = (
    *mutants(
        f"{ENGINE}/speculative.py",
        OF_EACH,
        ("mine = [row for row, of_row in enumerate(policies) if of_row == policy]", "mine = list(range(len(policies)))"),
        ("rows.only(at))\n        accepted[at]", "rows.only(slice(len(mine))))\n        accepted[at]"),
        ("lossless = all(policy.lossless for", "lossless = any(policy.lossless for"),
        ("row, (policy, tree) in each], trees", "row, (_, tree) in each for policy in policies[:1]], trees"),
    ),
    *mutants(
        f"{ENGINE}/multi_step.py",
        OF_EACH,
        ("own=[isinstance(rule_of(policy), SampleMatch) for policy in policies]", "own=[isinstance(rule_of(policies[0]), SampleMatch)] * len(policies)"),
    ),
    *mutants(
        f"{ENGINE}/drafters/chains.py",
        OF_EACH,
        ("at, sequence.policy.draft_noise)", "at, self.sequences[0].policy.draft_noise)"),
    ),
    *mutants(
        f"{ENGINE}/drafters/trees.py",
        OF_EACH,
        ("drawn = sequence.policy.draws_children and not sequence.params.greedy", "drawn = not sequence.params.greedy"),
        ("position, sequence.policy.draft_noise)", "position, type(sequence.policy.draft_noise)(1))"),
    ),
    *mutants(
        f"{ENGINE}/drafters/model_fast.py",
        OF_EACH,
        ("for each in sequences]\n        return library().ModelDrafter", "for each in sequences[:1]] * len(sequences)\n        return library().ModelDrafter"),
    ),
    *mutants(
        f"{ENGINE}/drafters/eagle_fast.py",
        OF_EACH,
        ("[each.policy.draft_noise for each in sequences])", "[each.policy.draft_noise for each in sequences[:1]] * len(sequences))"),
    ),
    *mutants(
        f"{ENGINE}/drafters/medusa_fast.py",
        OF_EACH,
        ("[each.policy.draft_noise for each in sequences]", "[sequences[0].policy.draft_noise] * len(sequences)"),
    ),
)  # fmt: skip

SCORED = ("tests/phase6/test_logprobs.py",)
SCORING = (
    *mutants(
        f"{ENGINE}/scheduler.py",
        SCORED,
        ("                first = 0  # known blocks have no logits\n", "                pass\n"),
        ("count, inline = 0, 1 if sequence.unscored else self.inline", "count, inline = 0, self.inline"),
    ),
    *mutants(
        f"{ENGINE}/llm_engine.py",
        SCORED,
        ("sequence.prompt_top)[max(0, known) :]", "sequence.prompt_top)"),
        ("several = None if any(each.top is not None for each in group) else self.several", "several = self.several"),
        ("[] if start else sequence.prompt_logprobs", "sequence.prompt_logprobs"),
    ),
    *mutants(
        f"{ENGINE}/runner.py",
        SCORED,
        ("        row.states = output.states or []\n", ""),
        ("len(text) - 1)]\n        draft, wanted", "len(text))]\n        draft, wanted"),
    ),
    *mutants(
        f"{ENGINE}/steps.py",
        SCORED,
        ("columns = [0, *(node + 1 for node in self.paths[row].nodes)][:emitted]", "columns = list(range(emitted))"),
    ),
    *mutants(
        f"{ENGINE}/logprobs.py",
        SCORED,
        ("(logprobs > mine).sum(-1) + 1", "(logprobs >= mine).sum(-1) + 1"),
    ),
)  # fmt: skip

CHOOSING = ("tests/phase6/test_drafter_choice.py",)
DRAFTERS = (
    *mutants(
        f"{ENGINE}/llm_engine.py",
        CHOOSING,
        ("advance(self.target, group[0].drafter, group,", "advance(self.target, next(iter(self.drafters.values())), group,"),
        ("        for drafter in dict.fromkeys(each.drafter for each in ready):  # each has a step of its own\n            yield from self._decode([each for each in ready if each.drafter is drafter], most)", "        if ready:\n            yield from self._decode(ready, most)"),
        ("            sequence.draft = self.draft if drafting.draft else None", "            sequence.draft = self.draft"),
        ("make_controller(drafting.cost_model)\n            self", "make_controller(llm.cost_model)\n            self"),
        ("            self.priced.add(name)\n", ""),
    ),
    *mutants(
        f"{ENGINE}/drafter_choice.py",
        CHOOSING,
        ("    other.backends = copy.copy(llm.backends)\n", ""),
        ("llm.options.tree if name in BRANCHING else \"off\"", "llm.options.tree"),
    ),
    *mutants(
        f"{ENGINE}/parallel/lead.py",
        CHOOSING,
        ("    if group.ends is None:\n", "    if True:\n"),
        ("layers=whole.layers)\n        group.ends", "layers=1)\n        group.ends"),
    ),
    *mutants(
        f"{ENGINE}/scheduler.py",
        CHOOSING,
        ("return self.plain if sequence.draft is None else self.drafted", "return self.drafted"),
    ),
    *mutants(
        f"{ENGINE}/graph_steps.py",
        ("tests/phase6/test_graphs.py", "-k", "another_drafter"),
        ("if caches != self.caches[: len(caches)]:", "if caches != self.caches:"),
    ),
)  # fmt: skip

OWNING = (
    *mutants(
        f"{ENGINE}/async_engine.py",
        ("tests/phase6/test_async_engine.py",),
        ("        self.engine.hurry(True)\n", ""),
        ("            self.engine.hurry(False)  # before the mail is read: work that comes later ends the next call\n", ""),
        ("        self.engine.hurry(False)  # the models may serve another engine\n", ""),
        ("    for loop, mine in calls.items():\n", "    for loop, mine in [(loop, [one]) for loop, mine in calls.items() for one in mine]:\n"),
    ),
    *mutants(
        f"{ENGINE}/capacity.py",
        ("tests/phase6/test_llm_engine.py",),
        ("and not options.pages and needed(options) > POOL * free:", "and False:"),
        ("int(POOL * free / needed(", "int(free / needed("),
        ("    if needed(options) > free:\n", "    if False:\n"),
    ),
)  # fmt: skip

MUTANTS = [*BLOCK_MANAGER, *PAGES, *SCHEDULER, *SERVING, *POLICIES, *SCORING, *DRAFTERS, *OWNING]
