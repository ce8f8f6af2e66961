"""The rotary positions that config.json describes, and the context that follows from their scaling.

The values are in `rope_parameters`, or in `rope_theta` and `rope_scaling`, depending on the version of transformers
that wrote the file. rope.py computes frequencies from them.

    rope, context = read_rope(keys), read_context(keys)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from common.errors import UserError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: the base frequency, and its scaling for long contexts (see rope.py)."""

    theta: float = 10_000.0
    scaling: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: derived from factor and the two mscales
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


def _rope_values(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(config.get("rope_parameters") or config.get("rope_scaling") or {})


def _original_context(config: Mapping[str, Any]) -> int | None:
    """Return the context before scaling. As in transformers, the key beside `rope_parameters` wins over that in it."""
    key = "original_max_position_embeddings"
    original: int | None = config.get(key) or _rope_values(config).get(key)
    return original


def read_context(config: Mapping[str, Any]) -> int:
    """Return the context in tokens. Linear and YaRN scaling give original context x factor, if that is known.

    `max_position_embeddings` is the context before scaling in some files (Qwen2.5 with the YaRN block of its card), and
    after scaling in others (deepseek-coder). `original_max_position_embeddings` names the context before scaling,
    `max_sequence_length` the one after it (vicuna-16k).
    """
    stated: int = config["max_position_embeddings"]
    values, original = _rope_values(config), _original_context(config)
    if values.get("rope_type", values.get("type")) not in ("linear", "yarn"):
        return stated
    if original:
        return max(stated, round(original * (values.get("factor") or 1.0)))
    return max(stated, config.get("max_sequence_length") or 0)


def context_note(config: Mapping[str, Any]) -> str | None:
    """Return a note for the user if the file does not say whether its context is before or after scaling."""
    values = _rope_values(config)
    scaled = values.get("rope_type", values.get("type")) in ("linear", "yarn")
    if not scaled or _original_context(config) or config.get("max_sequence_length"):
        return None
    stated = config["max_position_embeddings"]
    return (
        f"note: max_position_embeddings of config.json, {stated}, is taken as the context after "
        f"rope scaling by {values.get('factor')}; if it is the one before, add original_max_position_embeddings to it"
    )


def read_rope(config: Mapping[str, Any]) -> RopeConfig:
    """Read `rope_parameters`, or `rope_theta` and `rope_scaling`. UserError names what is not supported."""
    values = _rope_values(config)
    theta = values.get("rope_theta", config.get("rope_theta", 10_000.0))
    kind = values.get("rope_type", values.get("type", "default"))
    if values.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("rotary positions over a part of the head (partial_rotary_factor) are not supported")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "dynamic":
        raise UserError(
            "rope scaling 'dynamic' (NTK) is refused: its frequencies depend on the current length, so a token's "
            "logits would change when later tokens arrive; use linear, llama3 or yarn"
        )
    if kind not in ("linear", "llama3", "yarn"):
        raise UserError(f"unsupported rope scaling {kind!r}; supported are default, linear, llama3, yarn")
    original = _original_context(config) or config["max_position_embeddings"]
    return RopeConfig(
        theta=theta,
        scaling=kind,
        factor=values.get("factor") or config["max_position_embeddings"] / original,
        original_context=original,
        low_freq_factor=values.get("low_freq_factor", 1.0),
        high_freq_factor=values.get("high_freq_factor", 4.0),
        beta_fast=values.get("beta_fast") or 32.0,
        beta_slow=values.get("beta_slow") or 1.0,
        attention_factor=values.get("attention_factor"),
        mscale=values.get("mscale"),
        mscale_all_dim=values.get("mscale_all_dim"),
        truncate=values.get("truncate", True),
    )
