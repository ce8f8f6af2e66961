"""Phase 5: sampling and speculative steps in C++. Each mutant is a separate build."""
# ruff: noqa: E501

from __future__ import annotations

from tests.support.mutants import mutants

SOURCES = "phase-5-kernels-kvcache/engine/kernels/cpp/src"
OPS = ("tests/phase5/test_cpp_ops.py",)
LOOPS = ("tests/phase5/test_cpp_speculate.py", "tests/every_phase/test_keys.py", "-k", "phase5 and (cpp or speculate)")

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

SPECULATE = mutants(
    f"{SOURCES}/speculate.cpp",
    LOOPS,
    ("sequence.sample, sequence.position + i); };", "sequence.sample, sequence.position); };"),
    ("sequence.sample, sequence.position + what.count);", "sequence.sample, sequence.position + what.count - 1);"),
    ("position + uint32_t(done.accepted), false", "position, false"),
    ("const float* last_row = target_probs + count * vocab;", "const float* last_row = target_probs + (count - 1) * vocab;"),
    ("draw_residual(\n                *target.isa, target_probs + row * vocab, draft_probs + row * vocab", "draw_residual(\n                *target.isa, target_probs + row * vocab, draft_probs"),
    ("std::min(done.accepted, what.count - 1)", "done.accepted"),
    ("sequence.held += int(sequence.new_tokens.size()) + held;", "sequence.held += held;"),
    ("sequence.position += int(tokens.size());", "sequence.position += held;"),
    ("advance(sequence, gained, done.accepted);", "advance(sequence, gained, 0);"),
    ("done.next == done.draft[size_t(done.accepted)])", "done.next == done.draft[0])"),
    ("what.how, what.purpose, draft_probs);", "what.how, DRAFT, draft_probs);"),
)  # fmt: skip

MUTANTS = [*SAMPLING, *SPECULATE]
