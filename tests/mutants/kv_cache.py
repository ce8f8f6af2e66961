"""Phase 5: the KV caches, and which sequences their rows hold."""
# ruff: noqa: E501

from __future__ import annotations

from tests.support.mutants import mutants

CACHES = "phase-5-kernels-kvcache/engine/kv_cache"
ALONE = ("tests/phase5/test_kv_cache.py",)
LOOPS = (
    *ALONE,
    "tests/phase5/test_cached_runner.py",
    "-k",
    "kv_cache or computes or share or changes or periodic or (every_step and 1.0)",
)

MANAGER = mutants(
    f"{CACHES}/manager.py",
    LOOPS,
    ("if held >= len(window) or row.held != window[:held]:", "if held > len(window) or row.held != window[:held]:"),
    ("if held >= len(window) or row.held != window[:held]:", "if held >= len(window):"),
    ("self._truncate(row, common_prefix(row.held, window[:-1]))", "self._truncate(row, common_prefix(row.held, window))"),
    ("if length < self.cache.shortest(row.number):\n            length = 0", "if length < self.cache.shortest(row.number):\n            pass"),
    ("del row.held[length:]", "pass"),
    ("and self.cache.first(other.number) == 0]", "]"),
    ("row.held = list(best.held)", "row.held = best.held"),
    ("self._truncate(row, shared)", "pass", "begin, which alone calls it, cuts the row back right after"),
    ("*(len(row.text) + node for node in nodes)]", "*(len(row.text) + node - 1 for node in nodes)]"),
    ("row.held += row.text + tokens", "row.held += row.text"),
    ("self.positions += len(text) + drafted", "self.positions += len(text)"),
    ("self.cache.truncate(row.number, 0)\n", "pass\n"),
    ("self.free.append(row.number)", "self.free.insert(0, row.number)", "any free row will do"),
)  # fmt: skip

COMMON = (
    *mutants(
        f"{CACHES}/protocol.py",
        ALONE,
        ("if not 0 <= length <= self.lengths[row]:", "if not 0 <= length:"),
    ),
    *mutants(
        f"{CACHES}/static.py",
        ALONE,
        ("self.lengths[row] + len(keys))", "self.lengths[row] + len(keys) + 1)"),
        ("self.lengths[row], self.lengths[row] + len", "self.lengths[row] - 1, self.lengths[row] - 1 + len"),
        ("self.lengths[row] + new)", "self.lengths[row] + new + 1)"),
        ("moved = [(start + entry, start + at)", "moved = [(entry, at)"),
        ("self.lengths[row] += len(entries)", "self.lengths[row] += max(entries, default=-1) + 1"),
        ("        if moved:", "        if False:"),
        ("if entry != at]", "if entry]", "an entry that stays is moved onto itself"),
    ),
)  # fmt: skip

STATIC = mutants(
    f"{CACHES}/static.py",
    ALONE,
    ("if self.lengths[row] + tokens > self.capacity:", "if self.lengths[row] + tokens >= self.capacity:"),
    ("slice(start, stop)", "slice(start + 1, stop + 1)"),
    ("self.lengths[into] = self.lengths[row]", "pass"),
)  # fmt: skip

RING = mutants(
    f"{CACHES}/ring.py",
    ALONE,
    ("self.slots = window + SPARE", "self.slots = window + SPARE - 1"),
    ("return max(0, self.reached[row] - self.slots)", "return max(0, self.lengths[row] - self.slots)"),
    ("return first + (self.slots - SPARE) - 1 if first else 0", "return first + (self.slots - SPARE) if first else 0"),
    ("return first + (self.slots - SPARE) - 1 if first else 0", "return first"),
    ("self.reached[row] = max(self.reached[row], self.lengths[row] + tokens)", "self.reached[row] = self.lengths[row] + tokens"),
    ("if length == 0:\n            self.reached[row] = 0", "if length == 0:\n            pass"),
    ("positions % self.slots", "positions.clamp(max=self.slots - 1)"),
    ("self.lengths[into], self.reached[into] = self.lengths[row], self.reached[row]", "self.lengths[into] = self.lengths[row]"),
    ("if 0 < length < self.shortest(row):", "if False:"),
)  # fmt: skip

PAGED = mutants(
    f"{CACHES}/paged.py",
    ALONE,
    ("wanted = -(-(start + tokens) // PAGE)", "wanted = (start + tokens) // PAGE"),
    ("if self.users[table[at]] > 1]", "if self.users[table[at]] > 2]"),
    ("for at in range(start // PAGE, min(len(table), wanted))", "for at in range(start // PAGE + 1, min(len(table), wanted))"),
    ("if lacking > len(self.free):", "if lacking >= len(self.free):"),
    ("self.users[table[at]] -= 1\n", "pass\n"),
    ("storage.move(table[at], mine)", "pass"),
    ("positions % PAGE", "(positions + 1) % PAGE"),
    ("if not self.users[page]:\n                self.free.append(page)", "self.free.append(page)"),
    ("while len(table) > -(-self.lengths[row] // PAGE):", "while len(table) > -(-self.lengths[row] // PAGE) + 1:"),
    ("self.users[page] += 1", "pass"),
    ("self.truncate(into, 0)\n", "pass\n"),
)  # fmt: skip

DYNAMIC = mutants(
    f"{CACHES}/dynamic.py",
    ALONE,
    ("of_layer[row].first(self.lengths[row]).joined(added)", "of_layer[row].joined(added)"),
    ("kept = [*range(start), *(start + entry for entry in entries)]", "kept = [*range(start), *(start + at for at, _ in enumerate(entries))]"),
    ("of_layer[row] = of_layer[row].first(length)\n", "pass\n", "append and read cut to the length themselves"),
    ("of_layer[into] = of_layer[row].first(self.lengths[row])", "of_layer[into] = of_layer[row]", "append and read cut to the length, and joining makes new memory"),
    ("self.lengths[into] = self.lengths[row]", "pass"),
)  # fmt: skip

STORAGE = mutants(
    f"{CACHES}/storage.py",
    ALONE,
    (".float() / 127).clamp(min=1e-30)", ".float() / 100).clamp(min=1e-30)"),
    ("clamp_(-127, 127)", "clamp_(-100, 100)"),
    (".round_().clamp_", ".floor_().clamp_"),
    ("for tensor in (self.values, self.scales):", "for tensor in (self.values,):"),
    ("lambda tensor: tensor.index_select(-2, index)", "lambda tensor: tensor[..., : len(entries), :]"),
)  # fmt: skip

MUTANTS = [*MANAGER, *COMMON, *STATIC, *RING, *PAGED, *DYNAMIC, *STORAGE]
