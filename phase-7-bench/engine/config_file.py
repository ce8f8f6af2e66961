"""The keys of config.json that the engine reads: the type and the bounds of each.

The bounds lie far above every existing model. A size that is within its bounds but wrong does not fit the checkpoint's
tensors; load.py reports that before memory is allocated.

    keys = read_keys(json.loads(Path("config.json").read_text()))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.errors import UserError
from common.files import wrong_value

Size = Annotated[int, Field(ge=1, le=2**24)]
Layers = Annotated[int, Field(ge=1, le=1024)]
Tokens = Annotated[int, Field(ge=1, le=2**30)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
Epsilon = Annotated[float, Field(gt=0, le=1)]


class Keys(BaseModel):
    """Values have exactly their JSON types: "2" is not a number. Null counts as absent, and other keys are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {key: value for key, value in values.items() if value is not None or key == "sliding_window"}


class RopeKeys(Keys):
    """The keys of `rope_parameters` or `rope_scaling`; config_rope.py checks the kind."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Annotated[float, Field(gt=1, le=1e12)] | None = None
    partial_rotary_factor: float | None = None
    factor: Annotated[float, Field(ge=1, le=1e6)] | None = None
    original_max_position_embeddings: Tokens | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    attention_factor: Positive | None = None
    mscale: Annotated[float, Field(ge=0, le=1e6)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0, le=1e6)] | None = None
    truncate: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_for_all_layers(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and any(isinstance(value, dict) for value in values.values()):
            raise ValueError("should hold one set of values for all layers")
        return values

    @model_validator(mode="after")
    def _bounds_are_apart(self) -> Self:
        if (self.low_freq_factor or 1.0) >= (self.high_freq_factor or 4.0):
            raise ValueError("should have a low_freq_factor below its high_freq_factor")
        return self


class ConfigFile(Keys):
    """The keys of all model families; each family has some of them. config.py checks which are required."""

    is_encoder_decoder: bool | None = None
    vocab_size: Size | None = None
    tie_word_embeddings: bool | None = None
    # Llama, Mistral, Qwen2, Qwen3; OPT shares some names
    hidden_size: Size | None = None
    num_hidden_layers: Layers | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    intermediate_size: Size | None = None
    max_position_embeddings: Tokens | None = None
    max_sequence_length: Tokens | None = None
    original_max_position_embeddings: Tokens | None = None
    rms_norm_eps: Epsilon | None = None
    hidden_act: str | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    rope_theta: Annotated[float, Field(gt=1, le=1e12)] | None = None
    rope_scaling: RopeKeys | None = None
    rope_parameters: RopeKeys | None = None
    partial_rotary_factor: float | None = None
    sliding_window: Tokens | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Field(ge=0, le=2**30)] | None = None
    layer_types: Annotated[list[str], Field(max_length=1024)] | None = None
    # GPT-2
    n_embd: Size | None = None
    n_layer: Layers | None = None
    n_head: Size | None = None
    n_inner: Size | None = None
    n_positions: Tokens | None = None
    layer_norm_epsilon: Epsilon | None = None
    activation_function: str | None = None
    scale_attn_weights: bool | None = None
    scale_attn_by_inverse_layer_idx: bool | None = None
    add_cross_attention: bool | None = None
    # OPT
    ffn_dim: Size | None = None
    word_embed_proj_dim: Size | None = None
    enable_bias: bool | None = None
    do_layer_norm_before: bool | None = None
    remove_final_layer_norm: bool | None = Field(None, alias="_remove_final_layer_norm")
    layer_norm_elementwise_affine: bool | None = None


def read_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a config.json that the engine reads and the file has. UserError names an invalid value."""
    try:
        keys = ConfigFile.model_validate(config)
    except ValidationError as error:
        raise UserError(wrong_value(error, "config.json")) from None
    return keys.model_dump(by_alias=True, exclude_unset=True)
