"""Every option of train_heads.py, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings

from common.flags import Threads
from engine.drafters.heads import HeadsKind

from .features import HeadInit


class HeadOptions(BaseSettings):
    """Train Medusa heads or an EAGLE layer for a target, or measure trained ones."""

    kind: HeadsKind = Field(default="eagle", description="what to train")
    target: str = Field(default="stdlib-10m", description="an embedded model, a folder, or a hub id")
    out: Path | None = Field(
        default=None, description="folder for checkpoints, the log and, in its `heads`, the result"
    )
    evaluate: Path | None = Field(default=None, description="measure the heads in this folder instead of training")
    corpus: list[Path] = Field(
        default=[], description="files to train on instead of the standard library; the last of several is held out"
    )
    generated: int = Field(default=0, ge=0, description="tokens for the target to write itself, to train on as well")
    generated_share: float = Field(default=0.5, ge=0, le=1, description="share of them in every batch")
    generated_rows: int = Field(default=64, ge=1, description="texts that the target writes at a time")
    depths: int = Field(default=4, ge=1, le=16, description="draft tokens to train for; of medusa, heads")
    blocks: int = Field(default=3, ge=1, le=8, description="of medusa: residual blocks per head")
    read_token: bool = Field(default=False, description="of medusa: read the token just drawn as well (Hydra)")
    ffn_width: int = Field(default=0, ge=0, description="of eagle: width of the feed-forward; 0: as the target's")
    taps: tuple[int, ...] = Field(default=(), description="layers to read beside the last state, as 1,3 (EAGLE-3)")
    unroll: int = Field(default=0, ge=0, description="of eagle: depths trained on its own predictions; 0: --depths")
    feature_loss: float = Field(default=0.0, ge=0, description="weight of the distance to the target's next state")
    head_init: Literal["auto"] | HeadInit = Field(default="auto", description="auto: medusa zero, eagle random")
    steps: int = Field(default=2000, ge=1, description="optimiser steps")
    batch_tokens: int = Field(default=4096, ge=16, description="tokens per optimiser step")
    micro_tokens: int = Field(default=4096, ge=16, description="tokens per forward; less means accumulation")
    logit_tokens: int = Field(default=1024, ge=1, description="positions whose logits are in memory at a time")
    window: int = Field(default=256, ge=8, description="tokens per row; eagle looks back as far")
    tv_share: float = Field(default=0.6, ge=0, le=1, description="share of the steps that train what is accepted")
    chain: bool = Field(default=True, description="in these, weigh depths by the chance that a chain gets there")
    decay: float = Field(default=0.8, gt=0, le=1, description="before, weight of each depth relative to the last")
    optimizer: Literal["muon", "adamw"] = Field(default="muon", description="of the matrices")
    lr: float = Field(default=3e-3, gt=0, description="peak learning rate; then linearly to zero")
    warmup: int = Field(default=50, ge=0, description="steps to the peak")
    weight_decay: float = Field(default=0.1, ge=0)
    seed: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    bf16: bool = Field(default=True, description="autocast the matrix products to bfloat16")
    threads: Threads = Field(default=0, description="CPU threads; 0 leaves torch's choice")
    save_every: int = Field(default=200, ge=1)
    eval_every: int = Field(default=200, ge=1)
    eval_rows: int = Field(default=64, ge=1, description="held-out windows to measure on")
    prompts: int = Field(default=24, ge=0, description="prompts of the test half for tokens per target forward")
    stop_after: int = Field(default=0, ge=0, description="stop after this step, to be resumed later; 0: never")

    @field_validator("taps", mode="before")
    @classmethod
    def _comma_separated(cls, value: object) -> object:
        return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value

    @property
    def trained_depths(self) -> int:
        return (self.unroll or self.depths) if self.kind == "eagle" else self.depths

    def shape(self, ffn_width: int) -> dict[str, Any]:
        if self.kind == "medusa":
            return {"heads": self.depths, "blocks": self.blocks, "taps": self.taps, "read_token": self.read_token}
        return {"ffn_width": self.ffn_width or ffn_width, "reach": self.window, "taps": self.taps}

    def decisive(self) -> dict[str, Any]:
        """What a resumed run must share with the one that it continues."""
        machine = {"out", "evaluate", "device", "threads", "save_every", "eval_every", "stop_after", "prompts"}
        return self.model_dump(mode="json", exclude=machine)
