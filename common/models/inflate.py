"""A larger checkpoint of the same function: a small trained model's output, at a large model's cost.

Speculation pays if the target is slow and the draft guesses well, and a trained pair of that size would not fit into
the repository. So the model is padded: wider, with more heads, more feed-forward units and more layers. The additions
have random weights, and every matrix that would write them into the residual stream holds zeros instead. A forward
computes all of it, and gives the logits of the small model. Acceptance is then that of the trained pair, and the cost
that of a large one; a report on such a model must say so.

- The stream [x, 0] has half the mean square of x when it is twice as wide: RMSNorm's weights are multiplied by
  sqrt(old width / new width), and its epsilon by the square of that.
- A new layer's output projections are zero, so it adds nothing to the stream.

    python -m common.models.inflate --model stdlib-10m --out runs/inflated-100m
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from pydantic_settings import BaseSettings
from safetensors.torch import save_file
from torch import Tensor

from common.checkpoint import open_checkpoint
from common.errors import UserError
from common.options import parse_options, run_main

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")


class InflateOptions(BaseSettings):
    """Make a larger checkpoint that computes the same function."""

    model: str = Field("stdlib-10m", description="a Llama checkpoint: an embedded model, a folder, or a hub id")
    out: Path = Field(description="folder for the larger one")
    layers: int = Field(12, ge=1, description="layers; new ones are inserted between the old ones")
    width: int = Field(768, ge=1, description="features of the stream, a multiple of the head width")
    ffn_width: int = Field(3072, ge=1, description="units of the feed-forward")
    seed: int = Field(0, ge=0, description="of the random weights")


def inflate(folder: Path, out: Path, layers: int, width: int, ffn_width: int, seed: int = 0) -> int:
    """Write the larger checkpoint into `out`; return its number of parameters. Matrices are float16, norms float32.

    UserError if the model is not a Llama without biases, or would not become larger.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    check(config, layers, width, ffn_width)
    tensors = {name: tensor.float() for name, tensor in open_checkpoint(str(folder)).tensors()}
    old_layers, old_width = config["num_hidden_layers"], config["hidden_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    d = config.get("head_dim") or old_width // heads
    group = heads // kv_heads
    new_kv = max(kv_heads, -(-width // (d * group)))
    new_heads = new_kv * group
    generator = torch.Generator().manual_seed(seed)
    shrink = (old_width / width) ** 0.5

    def noise(shape: tuple[int, int], like: Tensor) -> Tensor:
        return torch.randn(shape, generator=generator) * like.std()

    def grown(old: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return random numbers with the old matrix in the corner; the new inputs are zero or the outputs unused."""
        new = noise(shape, old)
        new[: old.shape[0], : old.shape[1]] = old
        return new

    def closed(old: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return zeros with the old matrix in the corner, for matrices that write into the residual stream."""
        new = torch.zeros(shape)
        new[: old.shape[0], : old.shape[1]] = old
        return new

    def norm(old: Tensor) -> Tensor:
        return torch.cat((old * shrink, torch.randn(width - old_width, generator=generator)))

    shapes = {
        "self_attn.q_proj": (new_heads * d, width),
        "self_attn.k_proj": (new_kv * d, width),
        "self_attn.v_proj": (new_kv * d, width),
        "self_attn.o_proj": (width, new_heads * d),
        "mlp.gate_proj": (ffn_width, width),
        "mlp.up_proj": (ffn_width, width),
        "mlp.down_proj": (width, ffn_width),
    }
    made: dict[str, Tensor] = {}
    embedding = tensors["model.embed_tokens.weight"]
    made["model.embed_tokens.weight"] = closed(embedding, (len(embedding), width))
    if "lm_head.weight" in tensors and not config.get("tie_word_embeddings"):
        made["lm_head.weight"] = grown(tensors["lm_head.weight"], (len(embedding), width))
    made["model.norm.weight"] = norm(tensors["model.norm.weight"])
    old_layer_of = {number * layers // old_layers: number for number in range(old_layers)}  # new layer -> the old one
    for number in range(layers):
        source = f"model.layers.{old_layer_of.get(number, 0)}."
        target = f"model.layers.{number}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            made[f"{target}{name}.weight"] = norm(tensors[f"{source}{name}.weight"])
        for name, shape in shapes.items():
            old = tensors[f"{source}{name}.weight"]
            writes = name in ("self_attn.o_proj", "mlp.down_proj")
            if number not in old_layer_of:
                made[f"{target}{name}.weight"] = torch.zeros(shape) if writes else noise(shape, old)
            else:
                made[f"{target}{name}.weight"] = (closed if writes else grown)(old, shape)

    out.mkdir(parents=True, exist_ok=True)
    stored = {name: (x.half() if x.ndim == 2 else x).contiguous() for name, x in made.items()}
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config |= {
        "hidden_size": width,
        "intermediate_size": ffn_width,
        "num_hidden_layers": layers,
        "num_attention_heads": new_heads,
        "num_key_value_heads": new_kv,
        "head_dim": d,
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6) * old_width / width,
        "dtype": "float16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER:
        if (folder / name).is_file():
            shutil.copy(folder / name, out / name)
    return sum(tensor.numel() for tensor in made.values())


def check(config: dict[str, Any], layers: int, width: int, ffn_width: int) -> None:
    """Raise UserError for a model that cannot be enlarged in this way."""
    name = (config.get("architectures") or ["?"])[0]
    if name != "LlamaForCausalLM" or config.get("attention_bias") or config.get("mlp_bias"):
        raise UserError(f"only Llama checkpoints without biases can be inflated, and this is a {name}")
    wanted = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": ffn_width}
    for key, value in wanted.items():
        if value < config[key]:
            raise UserError(f"{key} must not shrink: the model has {config[key]}, and {value} were asked for")


def main(arguments: list[str]) -> int:
    options = parse_options(InflateOptions, arguments, program="inflate.py")
    source = open_checkpoint(options.model)
    parameters = inflate(source.folder, options.out, options.layers, options.width, options.ffn_width, options.seed)
    print(f"{options.out}: {parameters / 1e6:.1f} million parameters, the function of {source.name}")
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
