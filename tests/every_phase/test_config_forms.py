"""Forms of config.json: each gives transformers' logits, or one line that names the key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.errors import UserError
from phase1.config import ONLY

pytestmark = pytest.mark.modules("config.py", "config_file.py", "config_rope.py", "load.py", "rope.py")
CPU = torch.device("cpu")
Make = Callable[..., Path]
MISSING = object()


def changed(folder: Path, to: Path, **keys: Any) -> Path:
    """Copy a checkpoint with other values in its config.json; MISSING removes a key."""
    shutil.copytree(folder, to)
    config = {**json.loads((to / "config.json").read_text()), **keys}
    config = {key: value for key, value in config.items() if value is not MISSING}
    (to / "config.json").write_text(json.dumps(config))
    return to


def check(engine: ModuleType, folder: Path, length: int = 40) -> None:
    """Check that the engine's logits are those of transformers."""
    tokens = torch.randint(1, 320, (1, length), generator=torch.Generator().manual_seed(4))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = reference(tokens, use_cache=False).logits
        logits = engine.load(str(folder), torch.float32, CPU).model(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def refused(engine: ModuleType, folder: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        engine.load(str(folder), torch.float32, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", [MISSING, None, [], ["GPT2Model"]])
def test_the_family_by_model_type(engine: ModuleType, make_checkpoint: Make, tmp_path: Path, names: Any) -> None:
    check(engine, changed(make_checkpoint("gpt2"), tmp_path / "changed", architectures=names))


@pytest.mark.parametrize("names", [["GPT2ForSequenceClassification"], ["FooForCausalLM"], ["LlamaModel", "x"]])
def test_other_architectures_are_refused(
    engine: ModuleType, make_checkpoint: Make, tmp_path: Path, names: list[str]
) -> None:
    folder = changed(make_checkpoint("gpt2"), tmp_path / "changed", architectures=names, model_type="foo")
    refused(engine, folder, f"{names[0]}.*supported are GPT2LMHeadModel")


def test_a_null_quantization_config_is_none(engine: ModuleType, make_checkpoint: Make, tmp_path: Path) -> None:
    check(engine, changed(make_checkpoint("llama"), tmp_path / "changed", quantization_config=None))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_stored_head_beats_the_tied_flag(
    engine: ModuleType, make_checkpoint: Make, tmp_path: Path, family: str
) -> None:
    folder = make_checkpoint(family, tie_word_embeddings=False)
    check(engine, changed(folder, tmp_path / "changed", tie_word_embeddings=True))


def test_an_equal_head_stays_tied(engine: ModuleType, make_checkpoint: Make, tmp_path: Path) -> None:
    folder = changed(make_checkpoint("llama", tie_word_embeddings=True), tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = engine.load(str(folder), torch.float32, CPU).model
    assert model.head.weight is model.embedding.weight
    assert model.config.tied
    check(engine, folder)


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.modules("config.py", "model.py")
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("mistral", {"layer_types": [FULL, FULL]}),
        ("mistral", {"layer_types": [SLIDING, SLIDING]}),
        ("qwen2", {"layer_types": MISSING, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("qwen2", {"layer_types": MISSING, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("qwen3", {"layer_types": [SLIDING, SLIDING], "use_sliding_window": True, "sliding_window": 8}),
        ("qwen3", {"layer_types": MISSING, "sliding_window": 8}),
        ("mistral", {"layer_types": [FULL, SLIDING]}),  # transformers loads it as a Ministral
        ("mistral", {"layer_types": [SLIDING, FULL]}),
        ("qwen2", {"layer_types": MISSING, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen2", {"layer_types": [SLIDING, FULL], "use_sliding_window": True, "sliding_window": 8}),
        ("qwen3", {"layer_types": [FULL, SLIDING], "use_sliding_window": True, "sliding_window": 8}),
        ("llama", {"pretraining_tp": 2}),  # the same products, summed in slices
    ],
)
def test_a_window_per_layer(
    engine: ModuleType, make_checkpoint: Make, tmp_path: Path, family: str, keys: dict[str, Any]
) -> None:
    check(engine, changed(make_checkpoint(family), tmp_path / "changed", **keys))


@pytest.mark.parametrize(
    ("family", "keys", "words"),
    [
        ("mistral", {"layer_types": [SLIDING, SLIDING], "sliding_window": None}, "sliding_window gives no window"),
        ("mistral", {"layer_types": ["chunked_attention", FULL]}, "should name full_attention or sliding_attention"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights.*only True"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine.*only True"),
    ],
)
def test_what_changes_the_forward_is_refused_by_name(
    engine: ModuleType, make_checkpoint: Make, tmp_path: Path, family: str, keys: dict[str, Any], words: str
) -> None:
    refused(engine, changed(make_checkpoint(family), tmp_path / "changed", **keys), words)


@pytest.mark.modules("config.py", "model.py")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_biases(engine: ModuleType, make_checkpoint: Make, family: str) -> None:
    check(engine, make_checkpoint(family, attention_bias=True, **({"mlp_bias": True} if family == "llama" else {})))


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_biases_that_a_family_does_not_have(
    engine: ModuleType, make_checkpoint: Make, tmp_path: Path, family: str
) -> None:
    check(engine, changed(make_checkpoint(family), tmp_path / "changed", attention_bias=True, mlp_bias=True))


# Keys that the engine reads, or refuses by name unless they have the one supported value.
READ = """
vocab_size n_positions n_embd n_layer n_head n_inner activation_function layer_norm_epsilon tie_word_embeddings
hidden_size num_hidden_layers ffn_dim max_position_embeddings num_attention_heads word_embed_proj_dim
enable_bias intermediate_size num_key_value_heads hidden_act rms_norm_eps rope_parameters attention_bias
mlp_bias head_dim sliding_window use_sliding_window max_window_layers layer_types bos_token_id eos_token_id
architectures model_type is_encoder_decoder
"""
# Keys without effect on the logits: training, other heads than the language model's, outputs, bookkeeping. Of these,
# reorder_and_upcast_attn and pretraining_tp compute the same function with other roundings.
WITHOUT_EFFECT = """
resid_pdrop embd_pdrop attn_pdrop initializer_range summary_type summary_use_proj summary_activation
summary_proj_to_labels pretraining_tp summary_first_dropout use_cache pad_token_id reorder_and_upcast_attn
dropout attention_dropout layerdrop init_std _name_or_path chunk_size_feed_forward dtype id2label label2id
output_attentions output_hidden_states problem_type return_dict transformers_version
"""


@pytest.mark.parametrize("family", ["GPT2", "OPT", "Llama", "Mistral", "Qwen2", "Qwen3"])
def test_every_key_of_transformers_is_classified(family: str) -> None:
    """Every new key of a configuration class must be classified: does it change the forward pass?"""
    keys = set(getattr(transformers, f"{family}Config")().to_dict())
    refused = set(ONLY.get(family.lower(), {}))
    assert keys - set(READ.split()) - set(WITHOUT_EFFECT.split()) - refused == set()
    assert refused <= keys


def test_only_an_encoded_id_past_the_model_is_refused(engine: ModuleType, make_checkpoint: Make) -> None:
    """The tokenizer has 320 ids. Mirrors of Llama 2 have one more than the model, for padding."""
    folder = make_checkpoint("llama", vocab_size=200)
    tokenizer = engine.load(str(folder), torch.float32, CPU).tokenizer
    text = tokenizer.decode([60, 61])
    assert max(tokenizer.encode(text)) < 200
    late = tokenizer.decode([319])
    with pytest.raises(UserError, match="only 200 tokens"):
        tokenizer.encode(late)
    with pytest.raises(UserError, match="only 200 tokens"):
        tokenizer.encode_batch([text, late])


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("keys", "context"),
    [
        ({"rope_scaling": YARN}, 512),  # Qwen2.5 with the block of its card
        ({"rope_scaling": YARN, "max_position_embeddings": 512}, 512),  # already extended
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, "max_sequence_length": 512}, 512),  # vicuna-16k
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 128),  # deepseek-coder: with a note
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": 32.0}}, 128),  # Llama 3.2 states the scaled one
        ({"rope_scaling": None}, 128),
    ],
)
def test_the_context_after_rope_scaling(
    engine: ModuleType,
    make_checkpoint: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    keys: dict[str, Any],
    context: int,
) -> None:
    folder = changed(make_checkpoint("llama"), tmp_path / "changed", rope_parameters=MISSING, rope_theta=1e4, **keys)
    assert engine.load(str(folder), torch.float32, CPU).config.context == context
    unclear = keys["rope_scaling"] == {"type": "linear", "factor": 4.0} and "max_sequence_length" not in keys
    assert ("note: max_position_embeddings" in capsys.readouterr().err) == unclear


def test_the_original_context_beside_the_scaling(engine: ModuleType, make_checkpoint: Make, tmp_path: Path) -> None:
    keys = {"rope_scaling": {**YARN, "original_max_position_embeddings": 64}, "original_max_position_embeddings": 32}
    folder = changed(make_checkpoint("llama"), tmp_path / "changed", rope_parameters=MISSING, rope_theta=1e4, **keys)
    check(engine, folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes", "compressed-tensors"])
def test_other_quantisation_is_refused_by_name(
    engine: ModuleType, make_checkpoint: Make, tmp_path: Path, method: str
) -> None:
    keys = {"quantization_config": {"quant_method": method, "bits": 4}}
    refused(engine, changed(make_checkpoint("llama"), tmp_path / "changed", **keys), f"quantised by '{method}'")


def test_mlx_is_refused_by_name(engine: ModuleType, make_checkpoint: Make, tmp_path: Path) -> None:
    keys = {"quantization": {"group_size": 64, "bits": 4}}
    refused(engine, changed(make_checkpoint("llama"), tmp_path / "changed", **keys), "quantised by 'mlx'")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_without_their_scales_are_refused(
    engine: ModuleType, make_checkpoint: Make, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = changed(make_checkpoint("llama"), tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(engine, folder, f"layers.1.mlp.down_proj.weight holds {dtype}")
