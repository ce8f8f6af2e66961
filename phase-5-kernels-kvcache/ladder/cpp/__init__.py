"""The rungs of the CPU ladder, built one by one: see README.md beside this file.

rung = Rung.of("rung2_threads", model, capacity=256, threads=2)
logits = rung.step(token=5, position=0)
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from engine.kernels import build
from engine.kernels.cpp.library import find_compiler, has_isa
from engine.model import Transformer
from engine.rope import frequencies

OMP = ["-fopenmp"]
PLAIN = ["-O2", "-fno-tree-vectorize", "-std=c++17", "-fPIC"]  # as written: the compiler adds no vectors
FAST = ["-O3", "-std=c++17", "-fPIC", "-w"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16"]


@dataclass(frozen=True)
class Kind:
    file: str
    title: str
    weights: torch.dtype
    flags: list[str]
    isa: str | None = None  # what the processor must have

    def why_not(self) -> str | None:
        if self.isa is not None and not has_isa(self.isa):
            return f"this processor lacks {self.isa}"
        return None


RUNGS = (
    Kind("rung1_naive", "naive float32", torch.float32, PLAIN),
    Kind("rung2_threads", "threads", torch.float32, [*PLAIN, *OMP]),
    Kind("rung3_avx2", "AVX2, half weights", torch.float16, [*FAST, *OMP, "-mavx2", "-mfma", "-mf16c"], "avx2"),
    Kind("rung4_avx512", "AVX-512 bfloat16", torch.bfloat16, [*FAST, *OMP, *AVX512], "avx512"),
)


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("qkv", "output", "gate_up", "down", "attention_norm", "ffn_norm")]


INTS = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab", "capacity", "threads")
POINTERS = ("norm", "embedding", "head", "cos", "sin", "keys", "values", "scratch")


class _Ladder(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in INTS),
        ("eps", ctypes.c_float),
        ("layer", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in POINTERS),
    ]


class Rung:
    """A Llama model on one rung, for one text of at most `capacity` tokens."""

    def __init__(self, kind: Kind, model: Transformer, capacity: int, threads: int) -> None:
        config = model.config
        if config.positions != "rope" or not config.gated or config.qkv_bias or config.qk_norm or any(config.windows):
            raise UserError(f"the ladder runs Llama models, and this is a {config.family}")
        self.kind, self.vocab = kind, config.vocab_size
        self._kept: list[Any] = []
        self._step = self._build().ladder_step
        layers = (_Layer * config.layers)()
        blocks: list[Any] = list(model.layers)
        norm: Any = model.norm
        for to, layer in zip(layers, blocks, strict=True):
            matrices = (layer.attention.qkv, layer.attention.output, layer.ffn.gate_up, layer.ffn.down)
            for name, linear in zip(("qkv", "output", "gate_up", "down"), matrices, strict=True):
                setattr(to, name, self._address(linear.weight, kind.weights))
            to.attention_norm = self._address(layer.attention_norm.weight)
            to.ffn_norm = self._address(layer.ffn_norm.weight)
        inverse, scale = frequencies(config.rope, config.head_dim)
        angles = torch.arange(capacity).float()[:, None] * inverse
        held = torch.zeros(config.layers, config.kv_heads, capacity, config.head_dim)
        widths = (config.heads + 2 * config.kv_heads) * config.head_dim + config.heads * config.head_dim
        scratch = torch.zeros(3 * config.width + widths + 2 * config.ffn_width + capacity)
        self._keys, self._values = held, held.clone()
        self._ladder = _Ladder(
            config.layers, config.width, config.heads, config.kv_heads, config.head_dim, config.ffn_width,
            config.vocab_size, capacity, threads, config.norm_eps, layers, self._address(norm.weight),
            self._address(model.embedding.weight), self._address(model.head.weight, kind.weights),
            self._address(angles.cos() * scale), self._address(angles.sin() * scale), self._address(self._keys),
            self._address(self._values), self._address(scratch),
        )  # fmt: skip
        self._kept.append(layers)
        self.weight_bytes = sum(
            linear.weight.numel() * torch.finfo(kind.weights).bits // 8
            for linear in model.modules()
            if isinstance(linear, torch.nn.Linear)
        )
        self._logits = torch.empty(config.vocab_size)

    def _build(self) -> ctypes.CDLL:
        compiler = find_compiler()
        if compiler is None:
            raise UserError("the ladder needs a C++ compiler (g++ or clang++)")
        source = Path(__file__).parent / f"{self.kind.file}.cpp"
        return ctypes.CDLL(str(build.build(self.kind.file, [source], compiler=compiler, flags=self.kind.flags)))

    def _address(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        kept = tensor.detach().to(dtype).contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    def step(self, token: int, position: int) -> Tensor:
        """Logits [V] of what follows the token; those at earlier positions must have been given before."""
        self._step(ctypes.byref(self._ladder), token, position, ctypes.c_void_p(self._logits.data_ptr()))
        return self._logits
