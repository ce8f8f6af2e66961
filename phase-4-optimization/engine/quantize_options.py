"""All options of quantize.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import BaseSettings

from common.flags import Threads

from .quantize_calibrated import Method


class QuantizeOptions(BaseSettings):
    """Write a quantised checkpoint, which --model of generate.py takes."""

    model: str = Field(default="stdlib-10m", description="an embedded model, a folder, or a hub id")
    out: Path = Field(description="folder for the quantised checkpoint")
    quant: Literal["int8", "int4"] = Field(default="int4", description="what to store the matrices in")
    method: Literal["auto", Method] = Field(default="auto", description="auto: of int4 gptq, of int8 rtn")
    group: Annotated[Literal[32, 64, 128], BeforeValidator(int)] = Field(
        default=64, description="of int4: input features that share a scale"
    )
    asymmetric: bool = Field(default=False, description="of int4: a zero point per group as well")
    head: bool = Field(default=False, description="quantise the output matrix too")
    corpus: list[Path] = Field(default=[], description="files to calibrate on instead of the standard library")
    tokens: int = Field(default=65536, ge=1, description="of awq and gptq: tokens to calibrate on")
    window: int = Field(default=512, ge=1, description="tokens per row of these")
    seed: int = Field(default=0, ge=0, description="which windows of the text")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Threads = Field(default=0, description="CPU threads; 0 leaves torch's choice")

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        if self.quant == "int8" and self.method not in ("auto", "rtn"):
            raise ValueError(f"--method {self.method} is for int4; int8 loses too little to calibrate it: --method rtn")
        return self

    @property
    def chosen(self) -> Method:
        automatic: Method = "gptq" if self.quant == "int4" else "rtn"
        return automatic if self.method == "auto" else self.method
