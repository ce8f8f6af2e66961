"""Learned heads on disk: a folder with heads.safetensors and heads.json, which names their target.

heads = load_heads(find_heads("auto", target, "eagle"), target, "eagle")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file

from common.checkpoint import MODELS
from common.companions import companion
from common.errors import UserError
from common.files import one_line, read_json, wrong_value
from common.weights import read_tensors

from ..config import ModelConfig
from ..load import LoadedModel
from ..quantize_files import is_quantized
from ..weights import lay_out, places, split
from .eagle import EagleHead, EagleShape
from .medusa import MedusaHeads, MedusaShape

HeadsKind = Literal["medusa", "eagle"]
Heads = MedusaHeads | EagleHead
SHAPES = {"medusa": TypeAdapter[Any](MedusaShape), "eagle": TypeAdapter[Any](EagleShape)}


def build_heads(kind: HeadsKind, shape: dict[str, Any], target: ModelConfig) -> Heads:
    """Build heads of this shape, without setting their weights. UserError if the target lacks a tapped layer."""
    shape = {**shape, "taps": tuple(shape.get("taps", ()))}
    for layer in shape["taps"]:
        if not 0 <= layer < target.layers:
            raise UserError(f"taps: the target has no layer {layer}; its layers are 0 to {target.layers - 1}")
    return (
        MedusaHeads(MedusaShape(**shape), target.width) if kind == "medusa" else EagleHead(EagleShape(**shape), target)
    )


def find_heads(option: str, target: LoadedModel, kind: HeadsKind) -> Path:
    """Find the folder of the heads to use. `auto`: the one named in lab.json of the target's folder, if any."""
    name: str | None = option
    if option == "auto":
        name = companion(target.checkpoint.folder, kind)
    if target.checkpoint.name.partition(":")[0] == "fake":
        raise UserError(f"the fake model has no hidden states for {kind} heads to read; use another --drafter")
    if name is None:
        raise UserError(f"{target.checkpoint.name} comes with no {kind} heads; {training_command(target, kind)}")
    embedded = MODELS / name
    folder = embedded if (embedded / "heads.json").is_file() else Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(f"no {kind} heads in {name}: no such folder; {training_command(target, kind)}")
    return folder


def training_command(target: LoadedModel, kind: HeadsKind) -> str:
    if is_quantized(target.checkpoint):
        return "heads are trained for models that are not quantised: name such a model, with --quant"
    command = f"python train_heads.py --kind {kind} --target {target.checkpoint.name} --out FOLDER"
    return f"train them with the last phase that has train_heads.py: {command}"


def save_heads(folder: Path, heads: Heads, target: LoadedModel, **about: object) -> None:
    """Write heads in float16; `about` is added to heads.json."""
    folder.mkdir(parents=True, exist_ok=True)
    single = split(heads.state_dict(), layer_config(heads, target.config))
    tensors = {name: tensor.detach().half().cpu().contiguous() for name, tensor in single.items()}
    save_file(tensors, folder / "heads.safetensors")
    document = {
        "kind": heads.kind,
        "target": target.checkpoint.name,
        "target_hash": target.checkpoint.content_hash(),
        "shape": heads.describe(),
        **about,
    }
    (folder / "heads.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def load_heads(folder: Path, target: LoadedModel, kind: HeadsKind) -> Heads:
    """Load heads in the target's dtype and on its device. UserError if they were trained for another target."""
    if not (folder / "heads.json").is_file() or not (folder / "heads.safetensors").is_file():
        raise UserError(
            f"no {kind} heads in {folder}: expected heads.json and heads.safetensors; {training_command(target, kind)}"
        )
    about = read_json(folder / "heads.json")
    if about.get("kind") != kind:
        raise UserError(f"{folder} holds {about.get('kind')} heads, and the drafter {kind} needs {kind} heads")
    if about.get("target_hash") != target.checkpoint.content_hash():
        raise UserError(
            f"{folder} holds heads for another target ({about.get('target')}, {about.get('target_hash')}) than "
            f"{target.checkpoint.name} ({target.checkpoint.content_hash()}); {training_command(target, kind)}"
        )
    try:
        SHAPES[kind].validate_python(about["shape"])
        heads = build_heads(kind, about["shape"], target.config)
    except (KeyError, TypeError, ValidationError) as error:
        wrong = wrong_value(error, "shape") if isinstance(error, ValidationError) else one_line(error)
        raise UserError(f"{folder / 'heads.json'}: not a description of {kind} heads ({wrong})") from None
    stored = {name: tensor.clone() for name, tensor in read_tensors(folder / "heads.safetensors")}
    kept = places(heads.state_dict(), layer_config(heads, target.config))
    expected = {name: list(place.shape) for name, place in kept.items()}
    for name in sorted(expected.keys() | stored.keys()):
        found = list(stored[name].shape) if name in stored else None
        if found != expected.get(name):
            raise UserError(
                f"{folder / 'heads.safetensors'}: tensor {name} has shape {found}, heads.json asks for "
                f"{expected.get(name)}; train them again or copy both files again"
            )
    state, weight = heads.state_dict(), target.model.embedding.weight
    for name, place in kept.items():
        state[place.name][place.rows] = stored[name]
    heads.to(device=weight.device, dtype=weight.dtype).requires_grad_(False).eval()
    lay_out(heads)
    return heads


def layer_config(heads: Heads, target: ModelConfig) -> ModelConfig:
    """Return the sizes of the heads' own layer. Heads without one have no fused matrices: the target's sizes serve."""
    return heads.config if isinstance(heads, EagleHead) else target


def target_states(target: LoadedModel, tokens: torch.Tensor, taps: tuple[int, ...]) -> torch.Tensor:
    """Compute the heads' input [B, T, F]: the target's normed output, then the outputs of the tapped layers."""
    hidden, tapped = target.model.states(tokens, taps=taps)
    return hidden if tapped is None else torch.cat((hidden, tapped), -1)
