"""Phase 3: policies, trees, and the drafting of chains and trees."""
# ruff: noqa: E501

from __future__ import annotations

from tests.support.mutants import mutants

ENGINE = "phase-3-policies-drafters/engine"
KEYS = ("tests/every_phase/test_keys.py", "-k", "phase3")
LAWS = ("tests/phase3/test_policies.py", "tests/phase3/test_tree_laws.py", "tests/phase3/test_policy_laws.py")
POLICIES = mutants(
    f"{ENGINE}/policies.py",
    (KEYS[0], *LAWS, "tests/phase3/test_policy_tokens.py", *KEYS[1:]),
    # Keys.
    ("draw_one(target, row, len(nodes), purpose)", "draw_one(target, row, 0, purpose)"),
    ("purpose = Purpose.RESIDUAL if tree.children(node) else Purpose.SAMPLE", "purpose = Purpose.SAMPLE"),
    ("purpose = Purpose.RESIDUAL if tree.children(node) else Purpose.SAMPLE", "purpose = Purpose.RESIDUAL"),
    ("Purpose.RESIDUAL if tree.children(node)", "Purpose.ACCEPT if tree.children(node)"),
    ("row.positions[:, None] + len(nodes), trial)", "row.positions[:, None], trial)"),
    ("len(nodes), trial)", "len(nodes), 0)"),
    ("token = draw_one(probs[node + 1], row, len(nodes))", "token = draw_one(probs[node + 1], row, 0)"),
    ("at = positions[active] + column", "at = positions[active]"),
    ("keys[active], at, Purpose.SAMPLE)", "keys[active], at, Purpose.RESIDUAL)"),
    ('Purpose.SAMPLE if name == "coupled" else Purpose.DRAFT', 'Purpose.DRAFT if name == "coupled" else Purpose.SAMPLE'),
    ("next_tokens = source.draw(following, keys, positions + accepted, Purpose.SAMPLE)", "next_tokens = source.draw(following, keys, positions, Purpose.SAMPLE)"),
    ("draw_one(target.probs[0, node + 1], row, len(nodes))", "draw_one(target.probs[0, node + 1], row, 0)"),
    # Recursive rejection.
    ("ratio = (target[token] / draft[token])", "ratio = (draft[token] / target[token])"),
    ("residual = (target - draft).clamp(min=0)", "residual = (target - draft).abs()"),
    ("target = residual / mass if mass > 0 else target", "target = target"),
    ("draft[token] = 0\n", "draft[token] = draft[token]\n"),
    ("draft = draft / left if left > 0 else draft", "draft = draft"),
    ("target, draft = probs[node + 1], tree.probs[node + 1]", "target, draft = probs[node + 1], tree.probs[0]"),
    ("if tree.probs is None:\n            return match_tree", "if tree.probs is not None:\n            return match_tree"),
    # The target's own choice.
    ("if tree.tokens[child] == token]", "if tree.tokens[child] != token]"),
    ("target.probs[active, column], keys", "target.probs[active, 0], keys"),
    ("(own[active] == draft.tokens[active, column]) & (column < widths[active])", "(own[active] == draft.tokens[active, column])"),
    # Lossy policies.
    ("return opinion >= self.tau", "return opinion > self.tau"),
    ("[min(self.k, flat.shape[-1])]", "[min(self.k + 1, flat.shape[-1])]"),
    ("entropy = -torch.xlogy(opinion, opinion)", "entropy = torch.xlogy(opinion, opinion)"),
    (".clamp(max=self.epsilon)", ".clamp(min=self.epsilon)"),
    ("passed = good & (torch.arange(K", "passed = good | (torch.arange(K"),
    ("accepted = passed.long().cumprod(dim=1).sum(dim=1)", "accepted = passed.long().sum(dim=1)"),
    ("node = fitting[0]\n", "node = fitting[-1]\n"),
)  # fmt: skip

CHAINS = mutants(
    f"{ENGINE}/drafters/chains.py",
    (KEYS[0], "tests/phase3/test_policy_laws.py", *KEYS[1:]),
    ("position = sequence.length + len(self.tokens[row])", "position = sequence.length"),
    ("(sequence.key, position)", "((sequence.key[0], 0), position)"),
    ("(sequence.key, position)", "((0, sequence.sample), position)"),
    ("key, at, self.noise)", "key, at, Purpose.DRAFT)"),
    ("key, at, self.noise)", "key, at, Purpose.ACCEPT)"),
    ("self.probs[row].append(probs[0])", "self.probs[row].append(logits.softmax(-1))"),
    ("if len(self.tokens[row]) < width]", "if len(self.tokens[row]) <= width]"),
    ("return self.sequences[row].tokens + self.tokens[row]", "return self.sequences[row].tokens"),
)  # fmt: skip

MAKERS = mutants(
    f"{ENGINE}/drafters/__init__.py",
    KEYS,
    ("ExtrapolateDrafter(target, source, noise, options.alpha)", "ExtrapolateDrafter(target, source, alpha=options.alpha)"),
    ("MedusaDrafter(target, heads, source, noise)", "MedusaDrafter(target, heads, source)"),
    ("EagleDrafter(target, heads, source, noise)", "EagleDrafter(target, heads, source)"),
)  # fmt: skip

TREE_LAWS = (KEYS[0], "tests/phase3/test_trees.py", "tests/phase3/test_tree_laws.py", *KEYS[1:])
TREES = mutants(
    f"{ENGINE}/drafters/trees.py",
    TREE_LAWS,
    ("(sequence.key, sequence.length + depth)", "(sequence.key, sequence.length)"),
    ("(sequence.key, sequence.length + depth)", "((0, sequence.sample), sequence.length + depth)"),
    ("key, position, self.noise)[0].tolist()", "key, position, self.noise)[0].flip(-1).tolist()"),
    ("key, position, self.noise)[0].tolist()", "key, position, Purpose.SAMPLE)[0].tolist()"),
    ("drawn = self.drawn and not sequence.params.greedy", "drawn = self.drawn"),
    ("[ranking(each.sequence.params)]", "[each.sequence.params]"),
    ("[ranking(each.sequence.params)]", "[ranking(frontiers[0].sequence.params)]"),
    ("[each.sequence.prompt]", "[frontiers[0].sequence.prompt]"),
    ("each.sequence.tokens + (each.tree.line(node) if node >= 0 else [])", "each.sequence.tokens"),
    ("if frontier.nodes]:", "if frontier.nodes][:1]:"),
    ("if self.drafter.ready(sequence) else 0", "if True else 0"),
    ("count = min(count, int((probs > 0).sum()))", "pass"),
    ("if not drawn:\n            return ranked", "if True:\n            return ranked"),
    ("torch.stack([rows.get(node, nothing) for node", "torch.stack([rows[-1] for node"),
    ("worth.append(value * (worth[node] if node >= 0 else 1.0))", "worth.append(value)"),
    ("key=lambda node: -worth[node])[: self.nodes]", "key=lambda node: worth[node])[: self.nodes]"),
    ("key=lambda node: -worth[node])[: self.nodes]", "key=lambda node: -worth[node])[: self.nodes + 1]"),
    ("frontier = [node for node in best_nodes if node >= first][: self.beam]", "frontier = [node for node in best_nodes if node >= first][:1]"),
    ("probs.gather(1, best).tolist(), best.tolist()", "probs.gather(1, best).tolist(), best.flip(-1).tolist()"),
    ("if value > 0:\n", "if value >= 0:\n"),
)  # fmt: skip

TREE = mutants(
    f"{ENGINE}/tree.py",
    TREE_LAWS,
    ("depths.append(1 if parent < 0 else depths[parent] + 1)", "depths.append(1 if parent < 0 else depths[parent])"),
    ("return self.parents == list(range(-1, len(self.parents) - 1))", "return self.parents == list(range(len(self.parents)))"),
    ("if parent == node]", "if parent == node][::-1]"),
    ("above = self.line(self.parents[node]) if self.parents[node] >= 0 else []", "above = self.line(self.parents[node]) if self.parents[node] > 0 else []"),
    ("related[node] |= related[parent]", "related[node, parent] = True"),
    ("if parent >= 0:\n                related", "if parent > 0:\n                related"),
    ("node = self.parents[node]\n        kept", "break\n        kept"),
)  # fmt: skip

LEVELS = mutants(
    f"{ENGINE}/drafters/model.py",
    ("tests/phase3/test_trees.py", "tests/phase3/test_tree_laws.py"),
    ("trees = [tree for tree, _ in branches]", "trees = [branches[0][0] for _ in branches]"),
    ("of_row[[node + 1 for node in nodes]]", "logits[0][[node + 1 for node in nodes]]"),
)  # fmt: skip

HEADS = mutants(
    f"{ENGINE}/drafters/medusa.py",
    ("tests/phase3/test_heads.py", "-k", "trees_of_a_batch"),
    ("if frontier.nodes == [-1]]:", "]:"),
    ("frontier.tree.depths[node] if node >= 0 else 0", "0"),
    ("self.level_logits(new), strict=True)", "self.level_logits(new).flip(0), strict=True)"),
)  # fmt: skip

SHAPES = mutants(
    f"{ENGINE}/tree_shapes.py",
    ("tests/phase3/test_trees.py",),
    ("falling = [[max(row[r:]) for r in range(len(row))] for row in acceptance]", "falling = acceptance"),
    ("heapq.heappush(waiting, (value * falling[depth][0], (*ranks, 0)))", "heapq.heappush(waiting, (value, (*ranks, 0)))"),
    ("value / falling[depth - 1][ranks[-1]] * falling[depth - 1][sibling[-1]]", "value * falling[depth - 1][sibling[-1]]"),
    ("if value == 0:", "if value != value:"),
)  # fmt: skip

CALIBRATED = mutants(
    "phase-3-policies-drafters/benchmarks/calibrate.py",
    ("tests/phase3/test_trees.py",),
    ("tried[depth][rank] += 1", "tried[depth][rank] += child == node"),
)  # fmt: skip

CACHED = "phase-5-kernels-kvcache/engine"
COSTS = mutants(
    f"{CACHED}/cost_model.py",
    ("tests/phase5/test_cost_model.py",),
    ("Table(PLAIN)", "Table()"),
    ("cost = min(took, most)", "cost = took"),
    ("cost = drafting + self.verify.at(rows + drafted)", "cost = self.verify.at(rows + drafted)"),
    ("if prefilled:  # the target's", "if False:  # the target's"),
    ("+ (0.0 if steady else drafting)", ""),
    ("+ (0.0 if steady else drafting)", "+ drafting"),
    ("self.credit += gain if self.looking else 0.0", "self.credit += gain"),
    ("self.balance += gain", "pass"),
    ("self.balance = min(0.0, self.balance + LOOK * took)", "pass"),
    ("self.balance = min(0.0, self.balance + LOOK * took)", "self.balance += LOOK * took"),
)  # fmt: skip

CHOICE = mutants(
    f"{CACHED}/controllers.py",
    ("tests/phase5/test_cost_model.py",),
    ("if most <= enough and cost_model.age:", "if False:"),
    ("if cost_model.age > STALE:", "if False:"),
    ("max(ALWAYS, math.ceil((loss - cost_model.credit) / gained))", "ALWAYS"),
)  # fmt: skip

PRICES = mutants(
    f"{CACHED}/prices.py",
    ("tests/phase5/test_prices.py", "-k", "after_a_change"),
    ("decoded(cost_model) - self.at < 100 * self.took", "decoded(cost_model) < 100 * self.took"),
    ("took = max(SECONDS, time.monotonic() - began)", "took = time.monotonic() - began"),
)  # fmt: skip

SHORT_CALLS = mutants(
    f"{CACHED}/multi_step.py",
    ("tests/phase5/test_multi_step.py", "-k", "time_outside_of"),
    ("before * 1e3 * (1 - len(made) / AHEAD)", "0.0"),
    ("(len(later) >= WARM or inside * 1e3 >= WARM_MS)", "True"),
)

COLD = mutants(
    f"{CACHED}/multi_step.py",
    ("tests/phase5/test_multi_step.py", "-k", "first_step_of_a_call"),
    ("later[len(later) // 2] if len(later) >= WARM else", ""),
)  # fmt: skip

MUTANTS = [
    *POLICIES,
    *CHAINS,
    *MAKERS,
    *TREES,
    *TREE,
    *LEVELS,
    *HEADS,
    *SHAPES,
    *CALIBRATED,
    *COSTS,
    *CHOICE,
    *PRICES,
    *SHORT_CALLS,
    *COLD,
]
