"""Quantised checkpoints: a folder in Hugging Face layout with the packed matrices of quantize.py.

`quantization_config` of `config.json` describes the format. Tensors have the engine's names:
`layers.0.ffn.down.values`, `.scales`, `.zeros`, `.factor`; all others are stored in the source's dtype.

python quantize.py --model stdlib-10m --quant int4 --out runs/int4
python generate.py --model runs/int4 --prompt "from pathlib import"
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.checkpoint import Checkpoint
from common.errors import UserError
from common.files import shown

from .config import ModelConfig
from .model import Transformer
from .parallel.shard import Shard
from .quantize import GROUPS, Format, QuantLinear, linear_names, replace

KEY = "quantization_config"
METHOD = "llm-inference-lab"  # `quant_method` of this format; other tools have other layouts
STORED = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of tensors that are not quantised
BESIDE = ("*.json", "*.txt", "*.model")  # the tokenizer's files, generation_config.json, lab.json


def is_quantized(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get(KEY) is not None


def save_quantized(
    folder: Path, source: Checkpoint, model: Transformer, format: Format, dtype: torch.dtype, about: dict[str, object]
) -> None:
    """Write a quantised model; other tensors are cast to `dtype`. `about` is added to config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in BESIDE:
        for file in source.folder.glob(pattern):
            if file.name != "config.json" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
    packed = packed_names(model)
    tensors = {
        name: (tensor if name in packed else tensor.to(dtype)).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "head.weight" or not model.config.tied
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    parts = {"head": isinstance(model.head, QuantLinear), "factor": any(name.endswith(".factor") for name in packed)}
    tied = {"tie_word_embeddings": model.config.tied}  # as the tensors are; the source's flag may be wrong
    config = {**source.config, **tied, KEY: {"quant_method": METHOD, **vars(format), **parts, **about}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_quantized(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    part_of: Callable[[ModelConfig], Shard] | None = None,
) -> Transformer:
    """Load a quantised checkpoint, or a part of it.

    UserError names a tensor that is missing, unknown or corrupt.
    """
    about = checkpoint.config[KEY]
    format = read_format(checkpoint.name, about)
    meta = torch.device("meta")  # names and shapes only: wrong sizes in config.json must not allocate memory
    with meta:
        model = Transformer(config)
    _make_room(checkpoint.name, model, format, about)
    expected, packed, shard = model.state_dict(), packed_names(model), None
    if config.tied:
        expected.pop("head.weight", None)
    if part_of is not None:
        tied = config.tied and not about.get("head", False)  # a quantised output matrix is stored besides the embedding
        shard = part_of(dataclasses.replace(config, tied=tied))
        with meta:
            model = shard.cut(Transformer(shard.local))
        _make_room(checkpoint.name, model, format, about)
    for name, stored in checkpoint.tensors():
        place = expected.pop(name, None)
        if place is None:
            raise UserError(f"{checkpoint.name}: tensor {name} is not one of a {config.family} model in {format}")
        if place.shape != stored.shape:
            raise UserError(
                f"{checkpoint.name}: tensor {name} has shape {list(stored.shape)}, config.json asks for "
                f"{list(place.shape)}"
            )
        mine = (name, stored) if shard is None else shard.part_of_fused(name, stored)
        if mine is None:
            continue  # another rank has it
        local, part = mine
        if name in packed:
            _check_packed(checkpoint.name, name, part, place.dtype, format)
        elif stored.dtype not in STORED:
            raise UserError(f"{checkpoint.name}: tensor {name} holds {stored.dtype}; expected one of {STORED}")
        tensor = part.to(device=device, dtype=place.dtype if name in packed else dtype, copy=True)
        replace(model, local, tensor if name in packed else nn.Parameter(tensor, requires_grad=False))
    if expected:
        raise UserError(f"{checkpoint.name}: tensor {sorted(expected)[0]} is missing; quantise the model again")
    if model.config.tied and not isinstance(model.head, QuantLinear):
        model.head.weight = model.embedding.weight
    if shard is not None:
        shard.complete(model, {}, dtype, device)
    return model.eval()


def _make_room(name: str, model: Transformer, format: Format, about: dict[str, Any]) -> None:
    """Put an empty QuantLinear in place of every quantised matrix."""
    for each in linear_names(model, about.get("head", False)):
        linear = model.get_submodule(each)
        assert isinstance(linear, nn.Linear)
        format.grouped(linear.weight[:1], f"{name}: {each}")
        shape, factor = (linear.out_features, linear.in_features), about.get("factor", False)
        replace(model, each, QuantLinear(shape, format, linear.bias is not None, factor, torch.device("meta")))


def packed_names(model: Transformer) -> set[str]:
    """Name the tensors of all quantised matrices."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    return {f"{name}.{part}" for name, linear in linears for part, _ in linear.named_buffers()}


def read_format(name: str, about: Any) -> Format:
    if not isinstance(about, dict) or about.get("quant_method") != METHOD:
        method = about.get("quant_method") if isinstance(about, dict) else about
        raise UserError(
            f"{name} is quantised by {shown(method)}, which is not read here: take the model as it was before, with "
            "--quant"
        )
    kind: Any = about.get("name")
    group: Any = about.get("group")
    flags = {key: about.get(key, False) for key in ("asymmetric", "head", "factor")}
    supported = kind in ("int8", "int4") and type(group) is int and group in GROUPS
    if not supported or any(type(flag) is not bool for flag in flags.values()):
        said = ", ".join(f"{key} {shown(value)}" for key, value in {"name": kind, "group": group, **flags}.items())
        raise UserError(
            f"{name}: {KEY} of config.json has {said}; expected int8 or int4, one of {', '.join(map(str, GROUPS))}, "
            "true or false"
        )
    return Format(kind, group, flags["asymmetric"])


def _check_packed(checkpoint: str, name: str, stored: Tensor, dtype: torch.dtype, format: Format) -> None:
    """Check dtype and values. A wrong scale would spoil a whole group without any error.

    Only scales of symmetric int4 may be negative.
    """
    if stored.dtype != dtype:
        raise UserError(f"{checkpoint}: tensor {name} holds {stored.dtype}, config.json asks for {dtype}")
    if not stored.is_floating_point():
        return
    good, wanted = torch.isfinite(stored), "finite"
    if name.endswith(".scales") and format.signed:
        good, wanted = good & (stored != 0), "finite and not 0"
    elif not name.endswith(".zeros"):
        good, wanted = good & (stored > 0), "finite and above 0"
    if not bool(good.all()):
        number = int((~good).sum())
        raise UserError(f"{checkpoint}: {number} of tensor {name} are not {wanted}; copy or quantise the model again")
