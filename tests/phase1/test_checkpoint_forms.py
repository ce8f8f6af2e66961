"""Checkpoints in the forms found on the hub: old and new names, prefixes, buffers, formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM

import phase1
from common.errors import UserError
from common.prompts import load_prompts

CPU = torch.device("cpu")
Make = Callable[..., Path]


def expected_logits(folder: Path, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    extra = {} if positions is None else {"position_ids": positions[None]}
    with torch.no_grad():
        logits: torch.Tensor = model(tokens, use_cache=False, **extra).logits
    return logits


def check(folder: Path, reference: Path | None = None, positions: torch.Tensor | None = None) -> None:
    """Check our logits of `folder` against transformers' logits of `reference` (the same folder by default)."""
    tokens = torch.randint(1, 320, (1, 24), generator=torch.Generator().manual_seed(4))
    model = phase1.load(str(folder), torch.float32, CPU).model
    expected = expected_logits(reference or folder, tokens, positions)
    torch.testing.assert_close(model(tokens, positions), expected, rtol=1e-4, atol=1e-4)


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, dirs_exist_ok=True)
    return to


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn tuned": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn with its factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    },
}


@pytest.mark.parametrize("scaling", list(SCALINGS))
@pytest.mark.parametrize("spelling", ["new", "old"])
def test_rope_scaling_in_both_spellings(make_checkpoint: Make, tmp_path: Path, scaling: str, spelling: str) -> None:
    values = {**SCALINGS[scaling], "rope_theta": 50_000.0}
    folder = make_checkpoint("llama", head_dim=16, max_position_embeddings=131_072, rope_parameters=values)
    written = folder
    if spelling == "old":
        written = copy(folder, tmp_path / "old")

        def old(config: dict[str, Any]) -> None:
            parameters = config.pop("rope_parameters")
            config["rope_theta"] = parameters.pop("rope_theta")
            parameters["type"] = parameters.pop("rope_type")
            config["rope_scaling"] = parameters

        edit_config(written, old)
    for first in (0, 60, 9_000, 131_048):
        check(written, reference=folder, positions=torch.arange(first, first + 24))


def test_a_llama_2_config_without_rope_keys(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = make_checkpoint("llama")
    old = copy(folder, tmp_path / "old")

    def strip(config: dict[str, Any]) -> None:
        for key in ("rope_parameters", "rope_theta", "head_dim"):
            config.pop(key, None)

    edit_config(old, strip)
    check(old, reference=folder)


def test_dynamic_scaling_is_refused_with_the_reason(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = copy(make_checkpoint("llama"), tmp_path / "dynamic")
    edit_config(
        folder, lambda config: config.update(rope_scaling={"type": "dynamic", "factor": 2.0}, rope_parameters=None)
    )
    with pytest.raises(UserError, match=r"dynamic.*later tokens"):
        phase1.load(str(folder), torch.float32, CPU)


@pytest.mark.parametrize("prefix", [True, False])
def test_gpt2_with_and_without_prefix_and_with_buffers(make_checkpoint: Make, tmp_path: Path, prefix: bool) -> None:
    folder = make_checkpoint("gpt2")
    old = copy(folder, tmp_path / "old")
    tensors = load_file(old / "model.safetensors")
    if not prefix:
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for layer in range(2):
        start = f"{'transformer.' if prefix else ''}h.{layer}.attn."
        tensors[start + "bias"] = torch.ones(1, 1, 128, 128).tril()
        tensors[start + "masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, old / "model.safetensors", {"format": "pt"})
    check(old, reference=folder)


def test_opt_as_bin_without_tokenizer_json(make_checkpoint: Make, tmp_path: Path) -> None:
    """OPT-125M's form: pytorch_model.bin, a slow GPT-2 tokenizer, BOS equal to EOS."""
    folder = make_checkpoint("opt", bos_token_id=2, eos_token_id=2, pad_token_id=1)
    old = copy(folder, tmp_path / "old")
    tensors = load_file(old / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}  # as in facebook/opt-125m
    torch.save(tensors, old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    # A byte-level BPE in the old file format: the single bytes, no merges.
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    for character in sorted(ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    (old / "vocab.json").write_text(json.dumps(vocabulary))
    (old / "merges.txt").write_text("#version: 0.2\n")
    (old / "tokenizer.json").unlink()
    (old / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "eos_token": "</s>", "add_bos_token": True}
        )
    )
    check(old, reference=folder)
    loaded = phase1.load(str(old), torch.float32, CPU)
    assert loaded.tokenizer.eos_ids == (2,)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("import os")) == "import os"


def test_a_folder_with_a_sentencepiece_model_alone(make_checkpoint: Make, tmp_path: Path) -> None:
    """Llama 2 and Mistral were first published like this: no tokenizer.json."""
    old = copy(make_checkpoint("llama", vocab_size=480), tmp_path / "old")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (old / name).unlink()
    (tmp_path / "text").write_text("".join(prompt.text for prompt in load_prompts("code")))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(old / "tokenizer"), vocab_size=480, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    llm = phase1.LLM(phase1.Options(model=str(old), max_tokens=8, device="cpu", dtype="float32"))
    library = sentencepiece.SentencePieceProcessor(model_file=str(old / "tokenizer.model"))
    prompt = [1, *library.encode("import os")]
    assert llm.loaded.tokenizer.encode("import os") == prompt
    made = llm.generate(["import os"])[0]
    # Bytes that are not UTF-8: the library replaces each of them, `tokenizers` their whole run.
    expected, written = library.decode([*prompt, *made.tokens]), "import os" + made.text
    assert expected.partition("\ufffd")[0] == written.partition("\ufffd")[0]
    assert len(written.partition("\ufffd")[0]) > len("import os")


def test_several_eos_ids(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = copy(make_checkpoint("llama"), tmp_path / "eos")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7, 9]}))
    loaded = phase1.load(str(folder), torch.float32, CPU)
    assert loaded.ending.eos_ids == (0, 7, 9)


def test_sharded_checkpoint(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sharded = copy(folder, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    model.save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    check(sharded, reference=folder)


def test_mistral_window_reaches_as_far_as_its_own_mask(make_checkpoint: Make) -> None:
    """24 tokens under a window of 8: far tokens must not be seen (without a window the logits differ)."""
    windowed, open_ = make_checkpoint("mistral", sliding_window=8), make_checkpoint("mistral", sliding_window=None)
    check(windowed)
    check(open_)
    tokens = torch.arange(1, 25)[None]
    assert not torch.allclose(expected_logits(windowed, tokens), expected_logits(open_, tokens), atol=1e-2)


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("opt", {"word_embed_proj_dim": 24}, "projection"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "each of 2 layers"),
        ("llama", {"hidden_act": "tanh"}, "tanh"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
def test_what_is_not_supported_is_named(
    make_checkpoint: Make, tmp_path: Path, family: str, change: dict[str, Any], words: str
) -> None:
    folder = copy(make_checkpoint(family), tmp_path / "changed")

    def apply(config: dict[str, Any]) -> None:
        for key, value in change.items():
            if value is None:
                del config[key]
            else:
                config[key] = value

    edit_config(folder, apply)
    with pytest.raises(UserError, match=words):
        phase1.load(str(folder), torch.float32, CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_a_plain_cast(make_checkpoint: Make, dtype: torch.dtype) -> None:
    folder = make_checkpoint("llama")
    tokens = torch.arange(1, 25)[None]
    half = phase1.load(str(folder), dtype, CPU).model(tokens)
    assert half.dtype == dtype
    full = phase1.load(str(folder), torch.float32, CPU).model(tokens)
    assert (half.float() - full).abs().max() < 0.15 * full.std()
