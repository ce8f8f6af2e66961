"""What a checkpoint's `config.json` says about a model, in one vocabulary for all families.

Hugging Face names the same thing differently in every family (`n_embd`, `hidden_size`) and in every year
(`rope_theta` beside `rope_scaling`, then `rope_parameters`). Here it is read once; the rest of the engine sees only
`ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from common.errors import UserError
from common.files import shown

from .config_file import read_keys
from .config_rope import RopeConfig, read_context, read_rope
from .quantize_schemes import METHODS, read_scheme

FAMILIES = {
    "GPT2LMHeadModel": "gpt2",
    "OPTForCausalLM": "opt",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


OWN_QUANTIZATION = "llm-inference-lab"  # what `quant_method` says where quantize.py wrote the folder
FULL, SLIDING = "full_attention", "sliding_attention"  # what `layer_types` calls a layer

# Keys that change what a model computes, and the only values that are supported.
ONLY: dict[str, dict[str, Any]] = {
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    "opt": {"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True},
}
# Of a Llama configuration; transformers' Mistral and Qwen classes do not read them.
LLAMA_BIASES = {"attention_bias": ("llama", "qwen3"), "mlp_bias": ("llama",)}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer. Widths are numbers of features, `context` is in tokens."""

    family: str
    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    context: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    positions: Literal["rope", "learned"]
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"]
    gated: bool  # SiLU-gated feed-forward (three matrices) or plain (two)
    rope: RopeConfig = field(default_factory=RopeConfig)
    position_offset: int = 0  # OPT's table of learned positions begins with two unused rows
    qkv_bias: bool = False
    output_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = (None,)  # how far back each layer sees, itself included; repeated if fewer
    tied: bool = False  # the output matrix is the embedding

    def window_of(self, layer: int) -> int | None:
        """Return how many positions a layer sees, the query's own included; None: all."""
        return self.windows[layer % len(self.windows)]

    @staticmethod
    def from_hf(config: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face `config.json`. UserError names what is not supported, and what is."""
        _refuse_foreign_quantization(config)
        family = _family(config)
        config = read_keys(config)
        if config.get("is_encoder_decoder"):
            raise UserError("is_encoder_decoder of config.json is true; supported are decoders only")
        for key, only in ONLY.get(family, {}).items():
            value = config.get(key, only)
            if value != only:
                raise UserError(f"{key} of config.json is {value!r}; of a {family} model only {only!r} is supported")
        try:
            read = {"gpt2": _gpt2, "opt": _opt}.get(family, _llama_like)(family, config)
        except KeyError as error:
            raise UserError(f"config.json of a {family} model lacks the key {error}") from None
        _check_heads(read)
        return read


def _check_heads(config: ModelConfig) -> None:
    """Raise UserError for sizes that are valid one by one and do not fit each other."""
    if config.heads % config.kv_heads:
        raise UserError(
            f"num_attention_heads of config.json is {config.heads}; it should be a multiple of num_key_value_heads, "
            f"{config.kv_heads}"
        )
    if config.head_dim < 1 or (config.positions == "rope" and config.head_dim % 2):
        rule = "at least 1" if config.head_dim < 1 else "even: rotary positions turn pairs of features"
        raise UserError(f"config.json gives heads of {config.head_dim} features; their number should be {rule}")


def _refuse_foreign_quantization(config: Mapping[str, Any]) -> None:
    """Raise UserError for a model that is quantised in a form that is not read here."""
    about = config.get("quantization_config")
    method = about.get("quant_method") if isinstance(about, dict) else about
    if about is None and config.get("quantization") is not None:
        method = "mlx"  # writes no method
    if isinstance(about, dict) and method in METHODS:
        read_scheme(about)
    elif (about is not None or method is not None) and method != OWN_QUANTIZATION:
        raise UserError(
            f"the model is quantised by {shown(method)}, which is not read here; supported are {', '.join(METHODS)}: "
            "or take the model as it was before"
        )


def _family(config: Mapping[str, Any]) -> str:
    """Return the family of `architectures`; of `model_type` if there is none, or the bare decoder (`GPT2Model`)."""
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise UserError(f"config.json: architectures should be a list of names, got {shown(names)}")
    name = names[0] if names else None
    bare = [causal.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model") for causal in FAMILIES]
    family = config.get("model_type") if not names or name in bare else FAMILIES.get(str(name))
    if family not in FAMILIES.values():
        named = f"model_type {shown(config.get('model_type'))}" if name is None else shown(name)
        raise UserError(f"unsupported architecture {named}; supported are {', '.join(FAMILIES)}")
    return str(family)


def _llama_like(family: str, config: Mapping[str, Any]) -> ModelConfig:
    """Read Llama, Mistral, Qwen2 or Qwen3: RMSNorm, rotary positions, grouped heads, gated SiLU."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    attention_bias, mlp_bias = (bool(config.get(key)) and family in of for key, of in LLAMA_BIASES.items())
    return ModelConfig(
        family=family,
        vocab_size=config["vocab_size"],
        layers=config["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or (128 if family == "qwen3" else width // heads),
        ffn_width=config["intermediate_size"],
        context=read_context(config),
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        positions="rope",
        rope=read_rope(config),
        activation=_activation(config.get("hidden_act", "silu")),
        gated=True,
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=mlp_bias,
        qk_norm=family == "qwen3",
        windows=_windows(family, config),
        tied=config.get("tie_word_embeddings", False),
    )


def _gpt2(family: str, config: Mapping[str, Any]) -> ModelConfig:
    width = config["n_embd"]
    return ModelConfig(
        family=family,
        vocab_size=config["vocab_size"],
        layers=config["n_layer"],
        width=width,
        heads=config["n_head"],
        kv_heads=config["n_head"],
        head_dim=width // config["n_head"],
        ffn_width=config.get("n_inner") or 4 * width,
        context=config["n_positions"],
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        positions="learned",
        activation=_activation(config.get("activation_function", "gelu_new")),
        gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied=config.get("tie_word_embeddings", True),
    )


def _opt(family: str, config: Mapping[str, Any]) -> ModelConfig:
    width = config["hidden_size"]
    if config.get("word_embed_proj_dim", width) != width:
        raise UserError("OPT with an embedding projection (word_embed_proj_dim, as OPT-350M) is not supported")
    bias = config.get("enable_bias", True)
    return ModelConfig(
        family=family,
        vocab_size=config["vocab_size"],
        layers=config["num_hidden_layers"],
        width=width,
        heads=config["num_attention_heads"],
        kv_heads=config["num_attention_heads"],
        head_dim=width // config["num_attention_heads"],
        ffn_width=config["ffn_dim"],
        context=config["max_position_embeddings"],
        norm="layer",
        norm_eps=1e-5,
        positions="learned",
        position_offset=2,
        activation=_activation(config.get("activation_function", "relu")),
        gated=False,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tied=config.get("tie_word_embeddings", True),
    )


def _activation(name: str) -> Literal["silu", "gelu_tanh", "gelu", "relu"]:
    known: dict[str, Literal["silu", "gelu_tanh", "gelu", "relu"]] = {
        "silu": "silu",
        "swish": "silu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu": "gelu",
        "relu": "relu",
    }
    if name not in known:
        raise UserError(f"unsupported activation {name!r}; supported are {', '.join(known)}")
    return known[name]


def _windows(family: str, config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the window of each layer, None if it sees everything. UserError for other `layer_types`.

    `layer_types` names every layer; transformers takes a Mistral that has it for a Ministral. Without it all layers of
    a Mistral slide, and those of a Qwen from `max_window_layers` on, if `use_sliding_window` is true.
    """
    if family not in ("mistral", "qwen2", "qwen3"):
        return (None,)
    layers = config["num_hidden_layers"]
    window: int | None = config.get("sliding_window", 4096)
    if family != "mistral" and not config.get("use_sliding_window"):
        window = None
    first = 0 if family == "mistral" else config.get("max_window_layers", 28)
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = [SLIDING if window is not None and layer >= first else FULL for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise UserError(f"layer_types of config.json should name {FULL} or {SLIDING} for each of {layers} layers")
    if window is None and SLIDING in kinds:
        raise UserError(f"layer_types of config.json names {SLIDING}, and sliding_window gives no window")
    return tuple(window if kind == SLIDING else None for kind in kinds)
