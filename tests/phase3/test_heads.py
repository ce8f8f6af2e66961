"""Medusa and EAGLE: drafting equals training, training learns and resumes, and wrong heads are refused."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import phase3
from common.errors import UserError
from common.philox import Purpose
from phase3.drafters.eagle import EagleDrafter, EagleHead, EagleShape, Lookahead
from phase3.drafters.heads import HeadsKind, build_heads, find_heads, load_heads, save_heads, target_states
from phase3.drafters.medusa import MedusaDrafter, MedusaHeads, MedusaShape
from phase3.teacher_forced import teacher_forced_acceptance
from tests.support.beside import beside

data, features, figures, loss, training = (
    beside(3, f"training.{name}") for name in ("data", "features", "figures", "loss", "trainer")
)
program = beside(3, "train_heads")
CPU = torch.device("cpu")
COURSE = {"steps": 30, "batch_tokens": 256, "warmup": 3, "window": 32, "lr": 1e-2, "eval_rows": 4}
TINY = {**COURSE, "bf16": False, "device": "cpu", "depths": 3, "save_every": 8, "eval_every": 15, "prompts": 0}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def target(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> phase3.LoadedModel:
    return phase3.load(str(make_checkpoint(request.param)), torch.float32, CPU)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("corpus")
    bodies = ("return left + right", "return left * right", "if left:\n        return right\n    raise KeyError(left)")
    functions = [f"def function_{n}(left, right):\n    {bodies[n * n % 3]}\n\n\n" for n in range(240)]
    for name, part in (("train.py", functions[:200]), ("heldout.py", functions[200:])):
        (folder / name).write_text("".join(part))
    return [folder / "train.py", folder / "heldout.py"]


def options(corpus: list[Path], kind: str, **changes: Any) -> Any:
    return training.HeadOptions.model_validate({**TINY, "corpus": corpus, "kind": kind, **changes})


def random_eagle(target: phase3.LoadedModel, taps: tuple[int, ...], reach: int = 64) -> EagleHead:
    torch.manual_seed(0)
    head = EagleHead(EagleShape(40, reach, taps), target.config)
    features.initialise(head, target.model, "random")
    return head.requires_grad_(False)


@pytest.mark.parametrize("taps", [(), (0, 1)])
def test_a_draft_computes_what_was_trained(target: phase3.LoadedModel, taps: tuple[int, ...]) -> None:
    """Each branch of a tree after t + 1 tokens gives the features of training at anchor t."""
    head, model = random_eagle(target, taps), target.model
    tokens = torch.randint(20, 300, (1, 20), generator=torch.Generator().manual_seed(1))
    states = target_states(target, tokens, taps)
    trained = features.features(head, model, tokens, states, 4)  # [4, 1, T, D]
    text = tokens[0].tolist()
    for t in (0, 5, 15):
        inputs = head.inputs(model.embedding(tokens[0, 1 : t + 2]), head.read(states[0, : t + 1]))
        ahead = Lookahead(head, model, inputs)
        tree = phase3.Tree([7, text[t + 2], 9, text[t + 3], text[t + 4]], [-1, -1, 1, 1, 3])
        levels = [ahead.predicted, ahead.extend(tree, [1]), ahead.extend(tree, [3, 2]), ahead.extend(tree, [4])]
        for depth, level in enumerate(levels):
            torch.testing.assert_close(level[0], trained[depth, 0, t], atol=1e-4, rtol=1e-4)


def test_the_memory_of_inputs_is_that_of_the_whole_text(target: phase3.LoadedModel) -> None:
    """After many ragged steps the drafter's inputs equal those computed from the final text, cut to its reach."""
    reach, params = 12, phase3.SamplingParams(temperature=1.0, max_new_tokens=30, ignore_eos=True)
    head, source = random_eagle(target, (0,), reach), phase3.KeyedSource()
    drafter = EagleDrafter(target.model, head, source)
    sequences = [phase3.Sequence(prompt, params, phase3.Ending()) for prompt in ([30, 31, 32], list(range(40, 60)))]
    steps = phase3.decode(target.model, drafter, sequences, source=source)
    for _ in itertools.islice(steps, 8):
        for sequence in sequences:
            text = torch.tensor([sequence.prompt + sequence.tokens])
            states = target_states(target, text[:, :-1], (0,))
            expected = head.inputs(target.model.embedding(text[0, 1:]), head.read(states[0]))[-reach:]
            found = drafter.memory.get(sequence)
            assert found is not None
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_beside_layers_with_windows_eagles_layer_has_its_own_reach(make_checkpoint: Callable[..., Path]) -> None:
    keys = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
    target = phase3.load(str(make_checkpoint("qwen2", **keys)), torch.float32, CPU)
    head, params = random_eagle(target, (0,)), phase3.SamplingParams(max_new_tokens=20, ignore_eos=True)
    assert target.config.windows == (None, 4)
    assert head.config.windows == (None,)
    drafter = EagleDrafter(target.model, head, phase3.GreedySource())
    sequence = phase3.Sequence(list(range(30, 42)), params, phase3.Ending())
    steps = list(phase3.decode(target.model, drafter, [sequence]))
    assert sum(stats.proposed for step in steps for stats in step.stats) > 0
    assert sequence.tokens == phase3.generate(target.model, [sequence.prompt], params)[0].tokens


@pytest.mark.about("engine/drafters/medusa.py, MedusaHeads.forward")
def test_zero_heads_repeat_the_target(target: phase3.LoadedModel) -> None:
    heads = MedusaHeads(MedusaShape(3, 2), target.config.width)
    features.initialise(heads, target.model, "zero")
    states, embedded = torch.randn(2, 5, target.config.width)
    assert torch.equal(heads(states, embedded), states.expand(3, 5, -1))
    features.initialise(heads, target.model, "copy")
    assert not torch.allclose(heads(states, embedded)[0], states, atol=1e-3)


@pytest.mark.parametrize("extra", [{}, {"taps": (0,), "read_token": True}])
def test_medusa_drafts_what_was_trained(target: phase3.LoadedModel, extra: dict[str, Any]) -> None:
    torch.manual_seed(0)
    heads = MedusaHeads(MedusaShape(2, 1, **extra), target.config.width).requires_grad_(False)
    features.initialise(heads, target.model, "random")
    for parameter in heads.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    params = phase3.SamplingParams(max_new_tokens=20, ignore_eos=True)
    drafter = MedusaDrafter(target.model, heads, phase3.GreedySource())
    sequence = phase3.Sequence([30, 31, 32], params, phase3.Ending())
    for _ in itertools.islice(phase3.decode(target.model, drafter, [sequence]), 4):
        text = torch.tensor([sequence.prompt + sequence.tokens])
        trained = features.features(
            heads, target.model, text, target_states(target, text, heads.taps), 1
        )  # the last anchor is visible
        torch.testing.assert_close(drafter.level_logits([sequence])[0, 0], target.model.logits(trained[0, 0, -1]))


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_trees_of_a_batch_read_the_output_matrix_once_per_level(
    target: phase3.LoadedModel, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Medusa's heads compute all levels at once. Each row gets the tokens that it gets alone."""
    source, calls, counted = phase3.KeyedSource(), list[int](), list[tuple[int, int]]()
    heads, eagle = MedusaHeads(MedusaShape(3, 2), target.config.width), random_eagle(target, (0,))
    features.initialise(heads.requires_grad_(False), target.model, "random")
    logits = target.model.logits

    def counting(hidden: Any) -> Any:
        calls.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(target.model, "logits", counting)

    def decode(prompts: list[list[int]]) -> list[list[int]]:
        medusa = MedusaDrafter(target.model, heads, source)
        base = medusa if kind == "medusa" else EagleDrafter(target.model, eagle, source)
        drafter = phase3.StaticTreeDrafter(base, [-1, -1, 0, 0, 1, 2], source, Purpose.DRAFT, drawn=True)
        params = [phase3.SamplingParams(temperature=1.0, seed=len(each), max_new_tokens=12) for each in prompts]
        each = zip(prompts, params, strict=True)
        sequences = [phase3.Sequence(prompt, mine, phase3.Ending()) for prompt, mine in each]
        for step in phase3.decode(target.model, drafter, sequences, source=source):
            tree = step.trees[0]
            counted.append((tree.depth, len(calls)))
            calls.clear()
            if kind == "medusa" and tree.probs is not None:  # nodes of one level have the distribution of one head
                assert torch.equal(tree.probs[1], tree.probs[2])
                assert not torch.allclose(tree.probs[0], tree.probs[1])
        return [sequence.tokens for sequence in sequences]

    prompts = [[30, 31, 32], list(range(40, 60)), [5]]
    together = decode(prompts)
    assert counted[:2] == [(0, 1), (3, 1 + (1 if kind == "medusa" else 3))]
    assert together == [decode([prompt])[0] for prompt in prompts]


def test_survival_is_the_exact_expectation() -> None:
    """Over all texts of three tokens from the target, the weights give the mean length of accepted chains."""
    generator = torch.Generator().manual_seed(0)
    V = 3
    p = torch.randn(V, V, generator=generator, dtype=torch.float64).softmax(-1)  # after each last token
    logits = torch.randn(V, V, generator=generator, dtype=torch.float64)
    q = logits.softmax(-1)
    expected = [0.0, 0.0]  # the draft reads the last token, as the target does; it starts after token 0
    for first, second in itertools.product(range(V), repeat=2):
        overlap = float(torch.minimum(p[0, first], q[0, first]))
        expected[0] += overlap / V
        expected[1] += overlap * float(torch.minimum(p[first, second], q[first, second]))
    weighted = torch.zeros(2, dtype=torch.float64)
    for first in range(V):
        tokens = torch.tensor([[1, 0, first]])  # anchor t = 0: tokens 0 and 1 are known
        _, survives = loss.acceptance(p[tokens], torch.stack([logits[0], logits[first]])[:, None, None], tokens)
        weighted += p[0, first] * survives[:, 0, 0]
    assert weighted.tolist() == pytest.approx(expected)


def test_gradients_of_the_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, p = (torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    token = torch.randint(7, (2, 5, 1), generator=generator)
    torch.autograd.gradcheck(loss.Overlap.apply, (logits.requires_grad_(), p.softmax(-1), token))


def test_the_first_objective_is_least_at_the_target() -> None:
    tokens = torch.randint(6, (2, 9))
    logits = torch.randn(2, 9, 6)
    right = torch.stack([logits[:, d + 1 : d + 8] for d in range(2)])
    objective = loss.Objective(accepted=False, chain=True, decay=0.5)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    expected = (entropy[:, 1:8].mean() + 0.5 * entropy[:, 2:9].mean()) / 1.5
    assert float(objective(logits.softmax(-1), right, tokens)) == pytest.approx(float(expected), rel=1e-5)
    assert float(objective(logits.softmax(-1), right + torch.randn(right.shape), tokens)) > float(expected)
    accepted = loss.Objective(accepted=True, chain=True, decay=0.5)
    assert float(accepted(logits.softmax(-1), right, tokens)) == pytest.approx(0, abs=1e-6)


def test_the_table_counts() -> None:
    stream = torch.tensor([1, 2, 1, 3, 1, 3, 4, 3, 4, 3])
    assert data.count_table(stream, 1, 6)[[1, 2, 3, 5]].tolist() == [3, 1, 4, 3]  # 5 never occurred: the most frequent
    assert data.count_table(stream, 2, 6)[2].item() == 3


def test_rows_of_both_kinds_in_proportion() -> None:
    batches = data.MixedBatches(torch.zeros(400).long(), torch.ones(400).long(), 0.25, 5, 10, 80, seed=0)
    assert batches.at(3).float().mean(1).sort().values.tolist() == [0.0] * 6 + [1.0] * 2
    assert data.MixedBatches(torch.zeros(400).long(), None, 0.25, 5, 10, 80, seed=0).at(0).shape == (8, 10)


def test_the_target_writes_in_its_own_distribution(target: phase3.LoadedModel) -> None:
    """Generated tokens have a likelihood near the target's entropy; those of the stream do not."""
    stream = torch.randint(20, 300, (500,), generator=torch.Generator().manual_seed(0))
    written = data.write_text(target, stream, count=640, length=64, rows=5, seed=0).view(-1, 64)
    assert written.shape == (10, 64)
    log_probs = target.model(written).log_softmax(-1)[:, :-1]
    surprise = -log_probs.gather(-1, written[:, 1:, None])[..., 0]
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    assert abs(float((surprise - entropy)[:, 8:].mean())) < 0.3
    assert float((surprise - entropy)[:, :7].mean()) > 1


@pytest.fixture(scope="module", params=["medusa", "eagle"])
def trained(
    request: pytest.FixtureRequest,
    target: phase3.LoadedModel,
    corpus: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """A run that was never interrupted."""
    trainer = training.HeadTrainer(options(corpus, request.param, blocks=2), target, tmp_path_factory.mktemp("run"))
    assert trainer.run()
    return trainer


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_heads_learn(trained: Any) -> None:
    rows = rows_of(trained.out)
    assert [row["step"] for row in rows] == list(range(30))
    first_stage, second = rows[:12], rows[12:]
    assert first_stage[-1]["loss"] < first_stage[0]["loss"] - 0.1
    assert second[-1]["loss"] < second[0]["loss"]
    assert 0 < second[-1]["loss"] < 1
    heldout = [row["heldout"] for row in rows if "heldout" in row]
    assert heldout[-1]["tokens_per_forward"] > 1.1
    assert heldout[-1]["survival"] == sorted(heldout[-1]["survival"], reverse=True)


def test_an_interrupted_run_ends_as_the_other(
    trained: Any, target: phase3.LoadedModel, corpus: list[Path], tmp_path: Path
) -> None:
    kind = trained.options.kind
    first = training.HeadTrainer(options(corpus, kind, blocks=2, stop_after=11), target, tmp_path)
    assert not first.run()
    second = training.HeadTrainer(options(corpus, kind, blocks=2), target, tmp_path)
    assert second.run()
    for (name, expected), found in zip(
        trained.heads.state_dict().items(), second.heads.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, found), name
    assert [row["loss"] for row in rows_of(tmp_path)] == [row["loss"] for row in rows_of(trained.out)]
    with pytest.raises(UserError, match=r"holds a run with --lr 0\.01"):
        training.HeadTrainer(options(corpus, kind, blocks=2, lr=5e-3), target, tmp_path).run()


def test_accumulated_gradients_are_those_of_one_batch(
    target: phase3.LoadedModel, corpus: list[Path], tmp_path: Path
) -> None:
    weights = []
    for number, changes in enumerate(({}, {"micro_tokens": 64, "logit_tokens": 32})):
        trainer = training.HeadTrainer(
            options(corpus, "eagle", steps=1, feature_loss=0.5, **changes), target, tmp_path / str(number)
        )
        tokens = trainer.batches.at(0)
        for micro in tokens.split(trainer.options.micro_tokens // 32):
            trainer._backward(micro, loss.Objective(True, True, 1.0), len(micro) / len(tokens))
        weights.append(trainer.heads.get_parameter("join.weight").grad)
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_saved_heads_load_and_draft(trained: Any, temperature: float, tmp_path: Path) -> None:
    """Greedy output equals plain. (Of a random target's favourites heads guess few, of its samples some.)"""
    target = trained.target
    save_heads(tmp_path, trained.heads, target)
    heads = load_heads(find_heads(str(tmp_path), target, trained.options.kind), target, trained.options.kind)
    params = phase3.SamplingParams(temperature=temperature, max_new_tokens=40, ignore_eos=True)
    source = phase3.GreedySource() if params.greedy else phase3.KeyedSource()
    prompts = [target.tokenizer.encode(text) for text in ("def function_", "return", "if left:\n")]
    sequences = [phase3.Sequence(prompt, params, phase3.Ending()) for prompt in prompts]
    policy = phase3.make_policy("longest_prefix" if params.greedy else "rejection")
    drafter = figures.learned_drafter(heads, target, source)
    accepted = 0
    for step in phase3.decode(target.model, drafter, sequences, policy, source=source):
        accepted += sum(stats.accepted for stats in step.stats)
    assert accepted > 0 or params.greedy
    if params.greedy:
        plain = phase3.generate(target.model, prompts, params)
        assert [sequence.tokens for sequence in sequences] == [generation.tokens for generation in plain]


def test_on_given_text_every_point_is_drafted_for(trained: Any) -> None:
    """Also the first, and where a single token is the prompt; states of the true text are what a step would give."""
    target, params = trained.target, phase3.SamplingParams(temperature=1.0, ignore_eos=True)
    asked: list[int] = []

    class Asked(phase3.KeyedSource):
        def decide(self, probability: torch.Tensor, *rest: Any) -> torch.Tensor:
            asked.append(probability.shape[1])
            return super().decide(probability, *rest)

    for prompt, without in (([30, 31, 32], 0), ([30], 1)):
        asked.clear()
        source = Asked()
        drafter = figures.learned_drafter(trained.heads, target, source)
        truth = list(range(40, 70))
        policy = phase3.make_policy("rejection")
        points = teacher_forced_acceptance(target.model, drafter, prompt, truth, params, policy, 3, source)
        assert set(asked) == {3}
        assert len(points) - len(asked) == without


def test_past_the_context(trained: Any) -> None:
    """The window jumps, the drafter goes on, and greedy output stays plain output."""
    target, params = trained.target, phase3.SamplingParams(max_new_tokens=60, ignore_eos=True)
    prompt = list(range(20, 110))  # of a context of 128
    sequence = phase3.Sequence(prompt, params, phase3.Ending())
    drafter = figures.learned_drafter(trained.heads, target, phase3.GreedySource())
    policy = phase3.make_policy("longest_prefix")
    for _ in phase3.decode(target.model, drafter, [sequence], policy):
        pass
    assert sequence.tokens == phase3.generate(target.model, [prompt], params)[0].tokens


def test_figures_count_the_table_on_the_same_positions(target: phase3.LoadedModel) -> None:
    """On text of period 3 a table of it has accuracy 1, and a wrong table 0."""
    rows = torch.tensor([20, 21, 22]).repeat(8)[None]
    table = torch.zeros(target.config.vocab_size, dtype=torch.long)
    kinds: list[tuple[HeadsKind, int]] = [("medusa", 2), ("eagle", 1)]
    for kind, gap in kinds:
        shape = {"heads": 2} if kind == "medusa" else {"ffn_width": 8}
        heads = build_heads(kind, shape, target.config)
        features.initialise(heads, target.model, "random")
        right = table.clone()
        right[[20, 21, 22]] = torch.tensor([20, 21, 22]).roll(-gap)
        assert figures.text_figures(heads, target, rows, 2, right)["table_accuracy"] == 1
        assert figures.text_figures(heads, target, rows, 2, table)["table_accuracy"] == 0


def test_wrong_heads_are_refused(trained: Any, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    target, kind = trained.target, trained.options.kind
    other: Any = "eagle" if kind == "medusa" else "medusa"
    save_heads(tmp_path, trained.heads, target)
    with pytest.raises(UserError, match=f"the drafter {other} needs {other} heads"):
        load_heads(tmp_path, target, other)
    with pytest.raises(UserError, match="comes with no"):
        find_heads("auto", target, kind)
    with pytest.raises(UserError, match=r"no such folder; train them .*: python train_heads.py --kind"):
        find_heads(str(tmp_path / "missing"), target, kind)
    with pytest.raises(UserError, match="train them"):
        load_heads(tmp_path / "missing", target, kind)
    stranger = phase3.load(str(make_checkpoint("qwen2")), torch.float32, CPU)
    with pytest.raises(UserError, match="holds heads for another target"):
        load_heads(tmp_path, stranger, kind)

    weights = tmp_path / "heads.safetensors"
    good, tensors = weights.read_bytes(), load_file(weights)
    weights.write_bytes(good[:-100])
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_heads(tmp_path, target, kind)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][..., :-1].contiguous()}, weights)
    with pytest.raises(UserError, match=f"tensor {name} has shape"):
        load_heads(tmp_path, target, kind)
    weights.write_bytes(good)
    about = json.loads((tmp_path / "heads.json").read_text())
    (tmp_path / "heads.json").write_text(json.dumps({**about, "shape": {"colour": 1}}))
    with pytest.raises(UserError, match="not a description"):
        load_heads(tmp_path, target, kind)
    for wrong in (
        {"heads": 10**9},
        {"heads": -1},
        {"reach": 0},
        {"ffn_width": 10**9},
        {"taps": ["a"]},
        {"taps": 5},
        [1],
        5,
    ):
        (tmp_path / "heads.json").write_text(json.dumps({**about, "shape": wrong}))
        with pytest.raises(UserError, match=r"heads.json: not a description of|heads.safetensors: tensor"):
            load_heads(tmp_path, target, kind)


def test_a_target_names_its_heads(trained: Any) -> None:
    """In lab.json, by a folder inside its own."""
    target, kind = trained.target, trained.options.kind
    inside, names = target.checkpoint.folder / "its-heads", target.checkpoint.folder / "lab.json"
    try:
        names.write_text(json.dumps({kind: "its-heads"}))
        save_heads(inside, trained.heads, target)
        assert find_heads("auto", target, kind) == inside.resolve()
        names.write_text(json.dumps({kind: "../its-heads"}))
        with pytest.raises(UserError, match=f"{kind} of .*lab.json should be an embedded model or a folder inside"):
            find_heads("auto", target, kind)
    finally:
        names.unlink()
        shutil.rmtree(inside)


def test_a_corpus_without_text_is_refused(target: phase3.LoadedModel, corpus: list[Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty.py"
    empty.write_text("\n")
    with pytest.raises(UserError, match="the file has no text"):
        training.HeadTrainer(options([empty, corpus[1]], "medusa"), target, tmp_path / "out")


def test_nan_stops_and_names_the_cause(target: phase3.LoadedModel) -> None:
    heads = MedusaHeads(MedusaShape(2, 1), target.config.width)
    features.initialise(heads, target.model, "zero")
    with torch.no_grad():
        heads.bias[0, 0, 0, 0] = math.nan
    with pytest.raises(UserError, match="weights of bias are not finite; lower --lr"):
        training.check_finite(math.nan, heads, 3)


def test_the_learning_rate_rises_and_falls(corpus: list[Path]) -> None:
    course = options(corpus, "medusa")
    rates = [training.learning_rate(step, course) for step in range(30)]
    assert rates.index(max(rates)) == 2
    assert rates[-1] == pytest.approx(1e-2 / 27)


def test_the_command_line(
    target: phase3.LoadedModel,
    corpus: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = ["--kind", "eagle", "--target", str(target.checkpoint.folder), "--out", str(tmp_path), "--taps", "0,1"]
    course = ["--steps=4", "--window=32", "--batch-tokens=128", "--prompts=0", "--device=cpu", "--generated=600"]
    files = [part for file in corpus for part in ("--corpus", str(file))]
    assert program.main([*run, *course, *files]) == 0
    about = json.loads((tmp_path / "heads" / "heads.json").read_text())
    assert about["shape"]["taps"] == [0, 1]
    assert about["target_hash"] == target.checkpoint.content_hash()
    assert len(about["heldout"]["accuracy"]) == 4
    assert "--taps 0,1" in (tmp_path / "heads" / "README.md").read_text()
    assert "held-out text" in capsys.readouterr().out
    load_heads(tmp_path / "heads", target, "eagle")
    with pytest.raises(UserError, match="give --out FOLDER to train, or --evaluate FOLDER"):
        program.main(["--kind", "eagle"])


def test_no_layer_beyond_the_last_is_tapped(target: phase3.LoadedModel) -> None:
    with pytest.raises(UserError, match="its layers are 0 to 1"):
        build_heads("eagle", {"ffn_width": 8, "taps": (2,)}, target.config)
