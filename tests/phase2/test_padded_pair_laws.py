"""Pairs of one tokenizer whose tables are padded to different widths are lossless, by enumeration."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import phase2
from common.errors import UserError
from phase2.model import Embedding, Linear
from phase2.pair import check_pair, fit_vocabulary

CPU = torch.device("cpu")
EXACT = 1e-12
Make = Callable[..., Path]


class OneHot(phase2.Transformer):
    """A model of one-hot tokens with a table [V, V] as head: the next token depends on the last one alone."""

    def __init__(self, table: Tensor, tied: bool = False) -> None:
        nn.Module.__init__(self)
        V = len(table)
        self.config = phase2.ModelConfig(
            family="table", vocab_size=V, layers=1, width=V, heads=1, kv_heads=1, head_dim=1, ffn_width=1,
            context=64, norm="rms", norm_eps=0.0, positions="rope", activation="silu", gated=False, tied=tied,
        )  # fmt: skip
        self.embedding, self.head = Embedding(V, V), Linear(V, V, bias=False)
        self.embedding.weight = nn.Parameter(torch.eye(V, dtype=table.dtype), requires_grad=False)
        self.head.weight = self.embedding.weight if tied else nn.Parameter(table.T.contiguous(), requires_grad=False)

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        found: Tensor = self.embedding(tokens if wanted is None else tokens.gather(1, wanted))
        return found


def pair(target: int, draft: int, seed: int = 3) -> tuple[OneHot, OneHot]:
    """Make models of these numbers of ids; on shared ids they partly agree."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, max(target, draft), max(target, draft), generator=generator, dtype=torch.float64)
    models = OneHot(both[0, :target, :target].clone()), OneHot(both.sum(0)[:draft, :draft].clone())
    fit_vocabulary(models[1], target)
    return models


SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "top-k": {"temperature": 0.6, "top_k": 2},
    "top-p": {"temperature": 2.0, "top_p": 0.7},
    "min-p": {"min_p": 0.3},
    "penalties": {"presence_penalty": 0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.5},
    "greedy": {"temperature": 0.0},
}


@pytest.mark.parametrize("widths", [(3, 2), (3, 5)])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_whole_loop(proof: SimpleNamespace, name: str, widths: tuple[int, int]) -> None:
    """The prompt ends in the target's last id, which a narrower draft lacks."""
    target, draft = pair(*widths)
    params = phase2.SamplingParams(**{"temperature": 1.0, "max_new_tokens": 3, **SETTINGS[name]})
    prompt = [0, widths[0] - 1]
    expected = proof.plain_law(target, params, phase2.Ending(), prompt)
    got = proof.speculative_law(target, draft, params, phase2.Ending(), prompt, 2)
    assert abs(sum(got.values()) - 1) < EXACT
    assert proof.total_variation(got, expected) < EXACT
    if name == "temperature 1":
        assert len(expected) == widths[0] ** 3, "every id of the target comes out, those that the draft lacks too"


@pytest.mark.parametrize("name", list(SETTINGS))
def test_ids_past_the_narrower_side_have_no_probability(name: str) -> None:
    params = phase2.SamplingParams(**{"temperature": 1.0, **SETTINGS[name]})
    narrow, wide = pair(5, 3)[1], pair(3, 5)[1]
    for tokens in ([0], [2, 4], [4]):
        probs = phase2.probabilities(narrow(torch.tensor([tokens]))[:, -1], [params], [tokens], [tokens])
        assert probs.shape == (1, 5)
        assert not probs[:, 3:].any()
        assert probs.sum() == pytest.approx(1)
    assert wide(torch.tensor([[0, 2]])).shape == (1, 2, 3)


@pytest.mark.about("engine/pair.py, fit_vocabulary")
@pytest.mark.parametrize("tied", [False, True])
def test_fitting_keeps_what_both_have(tied: bool) -> None:
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    whole, model = OneHot(table, tied), OneHot(table, tied)
    for size in (8, 6, 5, 3):  # wider, less wide, unchanged, narrower
        fit_vocabulary(model, size)
        assert model.config.vocab_size == len(model.embedding.weight) == size
        assert (model.head.weight is model.embedding.weight) == tied
        logits, kept = model(torch.tensor([[1, 2]])), min(size, 5)
        assert torch.equal(logits[..., :kept], whole(torch.tensor([[1, 2]]))[..., :kept])
        assert logits.shape[-1] == size
        assert bool((logits[..., kept:] == float("-inf")).all())


def test_a_fake_draft_is_made_anew() -> None:
    draft = phase2.FakeModel(40, 64, 0.7)
    fit_vocabulary(draft, 48)
    assert torch.equal(draft(torch.tensor([[1, 2]])), phase2.FakeModel(48, 64, 0.7)(torch.tensor([[1, 2]])))


def loaded(folder: Path) -> phase2.LoadedModel:
    return phase2.load(str(folder), torch.float32, CPU)


def with_tokens(folder: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Copy a checkpoint with a changed tokenizer.json."""
    shutil.copytree(folder, to)
    document = json.loads((to / "tokenizer.json").read_text())
    change(document)
    (to / "tokenizer.json").write_text(json.dumps(document))
    return to


def rename_special(document: dict[str, Any]) -> None:
    special = document["added_tokens"][0]
    vocabulary = document["model"]["vocab"]
    vocabulary["<other>"] = vocabulary.pop(special["content"])
    special["content"] = "<other>"
    document["post_processor"] = None


def add_token(document: dict[str, Any]) -> None:
    added = {**document["added_tokens"][0], "id": len(document["model"]["vocab"]), "content": "<pad>"}
    document["added_tokens"].append(added)


def swap_words(document: dict[str, Any]) -> None:
    vocabulary = document["model"]["vocab"]
    names = {number: name for name, number in vocabulary.items()}
    vocabulary[names[100]], vocabulary[names[101]] = 101, 100


@pytest.mark.about("engine/pair.py, check_pair")
@pytest.mark.parametrize(("change", "token"), [(rename_special, 0), (add_token, 320)])
def test_names_of_special_tokens_are_noted(
    make_checkpoint: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], object],
    token: int,
) -> None:
    folder = make_checkpoint("llama")
    target, draft = loaded(folder), loaded(with_tokens(folder, tmp_path / "other", change))
    capsys.readouterr()
    check_pair(target, target)
    assert capsys.readouterr().err == ""
    for one, two in ((target, draft), (draft, target)):
        check_pair(one, two)
        err = capsys.readouterr().err
        assert err.startswith("note: draft ")
        assert err.count("\n") == 1
        assert f"have different names for 1 special or added tokens, first {token}: " in err


@pytest.mark.about("engine/pair.py, check_pair")
def test_other_words_are_an_error(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = make_checkpoint("llama")
    target, draft = loaded(folder), loaded(with_tokens(folder, tmp_path / "other", swap_words))
    with pytest.raises(UserError, match=r"must share a vocabulary; token 100 is '.+' and '.+'$"):
        check_pair(target, draft)


def test_counts_of_rows_are_no_difference(make_checkpoint: Make) -> None:
    target = loaded(make_checkpoint("llama"))
    draft = dataclasses.replace(target, model=loaded(make_checkpoint("llama", vocab_size=384)).model)
    check_pair(target, draft)
