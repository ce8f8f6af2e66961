"""Phase 5: sampling, places in a cache and the decoding loop in C++. Each mutant is a separate build."""
# ruff: noqa: E501

from __future__ import annotations

from tests.support.mutants import mutants

SOURCES = "phase-5-kernels-kvcache/engine/kernels/cpp/src"
OPS = ("tests/phase5/test_cpp_ops.py",)
LOOPS = (
    "tests/phase5/test_cpp_ops.py",
    "tests/phase5/test_cpp_speculate.py", "tests/phase5/test_cpp_batch.py", "tests/phase5/test_cpp_eagle.py",
    "tests/phase5/test_cpp_medusa.py", "tests/every_phase/test_keys.py", "-k", "phase5 and (cpp or speculate)",
)  # fmt: skip

SAMPLING = mutants(
    f"{SOURCES}/sampling.cpp",
    OPS,
    ("if (float(sum) > limit) break;", "if (float(sum) >= limit) break;"),
    ("if (x[i] < least) logits", "if (x[i] <= least) logits"),
    ("(x[a] == x[b] && a > b)", "(x[a] == x[b] && a < b)"),
    ("for (int i = 0; i < vocab - 1; ++i) {  // the most likely", "for (int i = 0; i < vocab; ++i) {  // the most likely"),
    ("(x[i] == smallest && room-- <= 0)", "(x[i] == smallest && room-- < 0)"),
    ("sorted.begin() + how.top_k - 1, sorted.end()", "sorted.begin() + how.top_k, sorted.end()"),
    ("x[i] /= temperature;", "x[i] *= temperature;"),
    ("const double wanted = double(uniform(seed, sample, position, purpose, 0)) * total;", "const double wanted = double(uniform(seed, sample, position, purpose, 0));"),
    ("if (sum > wanted) return i;", "if (sum >= wanted && probs[i] > 0) return i;", "differs only where the number meets a running sum exactly"),
    ("sum + sums[block] <= wanted", "sum + sums[block] < wanted + sums[block]"),
    ("uint32_t a = index / 4, b = position", "uint32_t a = index, b = position"),
    ("position + uint32_t(i), ACCEPT, 0)", "position, ACCEPT, 0)"),
    ("vocab, seed, sample, position, RESIDUAL);", "vocab, seed, sample, position, ACCEPT);"),
    ("if (!(least < ratios[i]) && accepted == count) accepted = i;", "if (!(least < ratios[i])) accepted = i;"),
    ("std::max(0.0f, spare[i] - draft[i])", "std::abs(spare[i] - draft[i])"),
    ("if (draft == nullptr) spare[rejected] = 0;", "if (draft == nullptr) spare[rejected] *= 1;"),
    ("draw_residual(isa, following, own, draft[accepted], vocab, seed, sample, at, certain, spare)", "draw_residual(isa, following, own, draft[accepted], vocab, seed, sample, position, certain, spare)"),
    ("draw_gumbel(isa, following, vocab, seed, sample, at, SAMPLE)", "draw_gumbel(isa, following, vocab, seed, sample, position, SAMPLE)"),
)  # fmt: skip

DECODE = mutants(
    f"{SOURCES}/decode.cpp",
    LOOPS,
    ("sequence, sequence.position + i, spare); };", "sequence, sequence.position, spare); };"),
    ("result.next = chosen(count);", "result.next = chosen(count - 1);"),
    ("position + uint32_t(i), false, residual.data()", "position, false, residual.data()"),
    ("i < drafts[r].tokens.size(); ++i)\n            converted", "i <= drafts[r].tokens.size(); ++i)\n            converted"),
    ("certain ? nullptr : drafts[r].probs[size_t(i)]", "certain ? nullptr : drafts[r].probs[0]"),
    ("const float* target_row = rows[r] + size_t(i) * size_t(vocab);", "const float* target_row = rows[r];"),
    ("position + uint32_t(i), ACCEPT, 0)", "position, ACCEPT, 0)"),
    ("result.next == draft[size_t(result.accepted)])", "result.next == draft[0])"),
    ("own[r] || batch[r].how.temperature == 0;", "own[r];", "at temperature 0 both rules accept the argmax alone"),
    ("return own[r] ||", "return own[0] ||"),
    ("batch[r].append(outcome.tokens, result.accepted);", "batch[r].append(outcome.tokens, 0);"),
    ("request.hidden + size_t(first + i) * D", "request.hidden + size_t(i) * D"),
    ("request.tapped + size_t(first + i) * (size - D)", "request.tapped + size_t(i) * (size - D)"),
)  # fmt: skip

CALLS = mutants(
    f"{SOURCES}/decode.cpp",
    ("tests/phase5/test_multi_step.py", "-k", "used_up or pass_the_end"),
    ("return spent < plan.budget_ms || plan", "return plan"),
    ("spent < plan.budget_ms || plan.budget_ms == 0", "true"),
    ("left[r] -= result.accepted + 1;", "left[r] -= result.accepted;"),
    ("ended |= left[r] <= plan.counts[r];", "ended |= left[r] < plan.counts[r];"),
)

HURRIED = mutants(
    "phase-6-gpu-streams-graphs/engine/kernels/cpp/src/decode.cpp",
    ("tests/phase6/test_async_engine.py", "-k", "new_work"),
    ("return !target.hurried && (spent", "return (spent"),
)

STATES = mutants(
    "phase-5-kernels-kvcache/engine/multi_step.py",
    ("tests/phase5/test_multi_step.py", "-k", "outside_of_a_call or states"),
    ("zip(counts, ready, strict=True)], 1  #", "zip(counts, ready, strict=True)], AT_ONCE  #"),
    ("read = [states[places[0][0].start :]]", "read = [states]"),
)

DRAFT = mutants(
    f"{SOURCES}/draft.cpp",
    LOOPS,
    ("row.held += int(new_tokens.size()) + cached;", "row.held += cached;"),
    ("position += int(tokens.size());", "position += cached;"),
    ("if (counts[size_t(r)] > i) active", "if (counts[size_t(r)] >= i) active"),
    ("while (before[at] != active[from]) ++at;", "at = from;"),
    ("sequence.position + i, purposes[r], spare)", "sequence.position, purposes[r], spare)"),
    ("purposes[r], spare)", "purposes[0], spare)"),
    ("uint32_t(position), purpose);", "uint32_t(position), DRAFT);", "drafts are drawn for SAMPLE or DRAFT alone"),
)  # fmt: skip

DRAFTERS = mutants(
    f"{SOURCES}/drafters.cpp",
    LOOPS,
    ("std::min(accepted, counts_[r] - 1)", "accepted"),
    ("return model_.draft(batch_, counts, purposes_, memory(probs, counts));", "return model_.draft(batch_, counts, std::vector<uint32_t>(batch_.size(), DRAFT), memory(probs, counts));"),
    ("outcome.states + size_t(outcome.state_count - gained) * size_t(states_), gained);", "outcome.states, gained - 1);"),
    ("sequence.position + int(mine.tokens.size()), purposes_", "sequence.position, purposes_"),
    ("purposes_[size_t(r)], spare", "purposes_[0], spare"),
    ("size_t(outcomes[r].state_count - 1) * size, size", "0, size"),
    ("y[i] += change[i] / (1 + std::exp(-change[i]));", "y[i] += change[i];"),
)  # fmt: skip

BATCH = ("tests/phase5/test_cpp_batch.py",)
PYTHON = "phase-5-kernels-kvcache/engine/drafters"
NOISE = (
    *mutants(
        f"{PYTHON}/model_fast.py",
        ("tests/phase5/test_cpp_speculate.py", *BATCH),
        ("[int(self.noise)] * len(batch)", "[1] * len(batch)"),
    ),
    *mutants(
        f"{PYTHON}/eagle_fast.py",
        ("tests/phase5/test_cpp_eagle.py", *BATCH),
        ("[self.noise] * len(batch)", "[Purpose.DRAFT] * len(batch)"),
    ),
    *mutants(f"{PYTHON}/medusa_fast.py", BATCH, ("[self.noise] * len(batch)", "[Purpose.DRAFT] * len(batch)")),
)

PLACES = mutants(
    f"{SOURCES}/engine.cpp",
    ("tests/phase5/test_cpp_step.py", "tests/phase5/test_cpp_bindings.py"),
    ("(position / cache.slots + 1) * cache.slots", "end"),
    ("token.entry = entries[held + i - from];", "token.entry = entries[i];"),
    ("row.held + count - row.view->cache.slots) : 0", "row.held - row.view->cache.slots) : 0", "lists entries before every window, which no query sees"),
    ("token.held = held;", "token.held = held + i;"),
    ("layer.window + count <= cache.slots + 1", "layer.window + count <= cache.slots + 2"),
    ("ring ? 0 : row.held / cache.slots; at", "ring ? 0 : 0; at"),
    ("int64_t(row.pages.size()) * cache.slots", "int64_t(row.pages.size() + 1) * cache.slots"),
)  # fmt: skip

MUTANTS = [*SAMPLING, *DECODE, *CALLS, *HURRIED, *STATES, *DRAFT, *DRAFTERS, *NOISE, *PLACES]
