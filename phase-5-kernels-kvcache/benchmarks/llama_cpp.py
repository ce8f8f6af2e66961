"""llama.cpp as a peer: the same weights as a GGUF file, run through its C API.

Needs llama-cpp-python and gguf (the extra `peers`). The time is that of llama_decode in a loop, at the thread count
that is fastest on this machine. numpy's argmax chooses tokens, outside of the timed part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError
from engine.config import ModelConfig
from engine.kernels.cpp import default_threads

Format = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
FAMILIES = ("llama", "qwen3")


def why_not(config: ModelConfig | None = None) -> str | None:
    """Return why llama.cpp cannot be measured, or None."""
    for module, package in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")):
        try:
            __import__(module)
        except (ImportError, OSError, RuntimeError) as error:
            return f"{package} is not installed ({type(error).__name__})"
    if config is not None and config.family not in FAMILIES:
        return f"the conversion to GGUF is written for Llama and Qwen3 checkpoints, and this is a {config.family}"
    return None


def write_gguf(folder: Path, config: ModelConfig, file: Path, format: Format) -> None:
    """Write the checkpoint as GGUF; norms stay float32. UserError if it is not a plain Llama or Qwen3."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize
    from safetensors.torch import load_file

    if config.family not in FAMILIES or config.rope.scaling != "default" or config.qkv_bias or config.mlp_bias:
        raise UserError(
            "the conversion to GGUF takes plain Llama and Qwen3 checkpoints, without biases or stretched positions"
        )
    kind = GGMLQuantizationType[format.upper()]
    writer = GGUFWriter(str(file), config.family)
    writer.add_name("peer")
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    write_vocabulary(writer, folder, config.vocab_size)

    tensors = {name: x for part in sorted(folder.glob("*.safetensors")) for name, x in load_file(part).items()}
    for name, tensor in tensors.items():
        target = gguf_name(name)
        if target is None or (config.tied and name == "lm_head.weight"):
            continue
        if config.family == "llama" and (".attn_q." in target or ".attn_k." in target):
            tensor = pairs_side_by_side(tensor, config.heads if ".attn_q." in target else config.kv_heads)
        values: NDArray[Any] = tensor.float().numpy()
        if tensor.ndim == 1:
            writer.add_tensor(target, values)
        else:
            writer.add_tensor(target, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vocabulary(writer: Any, folder: Path, size: int) -> None:
    """Write the vocabulary of a tokenizer of GPT-2's kind, which llama-server needs; of others there are only ids."""
    from gguf import TokenType

    file = folder / "tokenizer.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    model, splits = found.get("model", {}), found.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or splits.get("type") != "ByteLevel":
        writer.add_tokenizer_model("no_vocab")
        return
    special = {each["id"]: each["content"] for each in found["added_tokens"]}
    texts = {number: text for text, number in model["vocab"].items()} | special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([texts.get(at, f"<unused {at}>") for at in range(size)])
    writer.add_token_types([TokenType.CONTROL if at in special else TokenType.NORMAL for at in range(size)])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    writer.add_add_bos_token(False)
    end = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    if isinstance(end, int):
        writer.add_eos_token_id(end)


def gguf_name(name: str) -> str | None:
    """Return the GGUF name of a tensor of a Llama checkpoint."""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    if name in whole:
        return whole[name]
    _, _, number, *rest = name.split(".")
    part = parts.get(".".join(rest[:-1]))
    return None if part is None else f"blk.{number}.{part}.weight"


def quantize_gguf(source: Path, file: Path, format: Literal["q8_0", "q4_0"]) -> None:
    """Quantise a GGUF file with llama.cpp's own quantiser, which keeps some tensors of q4_0 in more bits."""
    import llama_cpp

    llama_cpp.llama_log_set(_quiet(), None)
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[format]
    if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), how) != 0:
        raise UserError(f"llama.cpp does not quantise {source} to {format}")


def table_bytes(file: Path) -> int:
    """Return the bytes of the embedding in a GGUF file."""
    from gguf import GGUFReader

    return next(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors if tensor.name == "token_embd.weight")


def pairs_side_by_side(weight: Tensor, heads: int) -> Tensor:
    """Permute for RoPE: llama.cpp rotates features 2i and 2i + 1, the checkpoint features half a head apart."""
    out, width = weight.shape
    return weight.view(heads, 2, out // heads // 2, width).transpose(1, 2).reshape(out, width)


@cache
def _quiet() -> Any:
    """Return a callback that discards llama.cpp's log; llama.cpp keeps it, so it must never be freed."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


class LlamaCpp:
    """One model and one context of llama.cpp."""

    def __init__(self, file: Path, vocab: int, tokens: int, threads: int, repack: bool = True) -> None:
        """Load a model. `repack`: let llama.cpp convert the weights to its own layouts; see `repacks`."""
        import llama_cpp

        self.api: Any = llama_cpp
        self.vocab = vocab
        self.api.llama_log_set(_quiet(), None)
        self.api.llama_backend_init()
        how = self.api.llama_model_default_params()
        how.use_extra_bufts = repack
        self.model = self.api.llama_model_load_from_file(str(file).encode(), how)
        if not self.model:
            raise UserError(f"llama.cpp does not load {file}")
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = tokens, 512, 512
        params.n_threads = params.n_threads_batch = threads
        self.context = self.api.llama_init_from_model(self.model, params)
        self.batch = self.api.llama_batch_init(512, 0, 1)
        self.held = 0

    def decode(self, tokens: list[int], every: bool = False) -> None:
        """Run a forward pass over new tokens after the cached ones; logits of the last one, or of all."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = token, self.held + at, 1, 0
            batch.logits[at] = every or at == len(tokens) - 1
        if self.api.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        self.held += len(tokens)

    def logits(self, count: int = 1) -> NDArray[np.float32]:
        """Return the logits [count, V] of the last forward pass."""
        found: Any = self.api.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, shape=(count, self.vocab)).copy()

    def cut(self, length: int) -> None:
        """Cut the cache to its first `length` tokens."""
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.context), 0, length, -1)
        self.held = length

    def set_threads(self, threads: int) -> None:
        self.api.llama_set_n_threads(self.context, threads, threads)

    def use_best_threads(self, steps: int) -> int:
        """Set and return the thread count at which single tokens are fastest."""
        times: dict[int, float] = {}
        for threads in range(1, default_threads() + 1):
            self.set_threads(threads)
            times[threads] = min(self.time_steps(1, steps) for _ in range(3))
        best = min(times, key=lambda threads: times[threads])
        self.set_threads(best)
        return best

    def wait(self) -> None:
        """Wait for the logits of the last forward pass."""
        self.api.llama_get_logits(self.context)

    def time_steps(self, width: int, steps: int) -> float:
        """Return seconds per forward pass of `width` tokens; for several, the cache is cut back each time."""
        start, total = self.held, 0.0
        for _ in range(steps):
            began = time.perf_counter()
            self.decode([7] * width, every=True)
            self.wait()
            total += time.perf_counter() - began
            if width > 1:
                self.cut(start)
        self.cut(start)
        return total / steps

    def close(self) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)


def repacks(file: Path, vocab: int) -> bool:
    """Return True if llama.cpp runs a forward pass over repacked weights without a crash, in its own process.

    On virtual machines that report AMX, its int8 kernels can crash with a segmentation fault.
    """
    code = (
        "import sys; from pathlib import Path; from benchmarks.llama_cpp import LlamaCpp;"
        f"LlamaCpp(Path({str(file)!r}), {vocab}, 64, 1).decode([1, 2, 3])"
    )
    folder, env = Path(__file__).resolve().parents[1], {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True)
    return done.returncode == 0
