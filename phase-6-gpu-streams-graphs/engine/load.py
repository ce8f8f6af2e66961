"""Load a checkpoint's tensors into a Transformer: names are mapped, shapes are checked, nothing is guessed.

Tensors are read one at a time from the memory-mapped file and cast right away, so loading needs little more memory than
the model itself.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.checkpoint import Checkpoint, open_checkpoint
from common.errors import UserError
from common.tokenizer import Tokenizer

from .config import ModelConfig
from .config_rope import context_note
from .model import Transformer
from .parallel.shard import Shard
from .quantize import Format, QuantLinear, linear_names, quantize_linear, quantized_linear, replace
from .quantize_files import is_quantized, load_quantized
from .quantize_others import PARTS, format_of, quantised, repacked, scheme_of, set_order
from .quantize_schemes import Scheme
from .sequence import Ending
from .weights import Place, fill, places, reserve

# The stored name of each of our tensors, by family. A value with several names: one stored matrix holds them in a row.
_LLAMA = {
    "model.embed_tokens": "embedding",
    "model.norm": "norm",
    "lm_head": "head",
    "model.layers.N.input_layernorm": "layers.N.attention_norm",
    "model.layers.N.self_attn.q_proj": "layers.N.attention.query",
    "model.layers.N.self_attn.k_proj": "layers.N.attention.key",
    "model.layers.N.self_attn.v_proj": "layers.N.attention.value",
    "model.layers.N.self_attn.o_proj": "layers.N.attention.output",
    "model.layers.N.self_attn.q_norm": "layers.N.attention.query_norm",
    "model.layers.N.self_attn.k_norm": "layers.N.attention.key_norm",
    "model.layers.N.post_attention_layernorm": "layers.N.ffn_norm",
    "model.layers.N.mlp.gate_proj": "layers.N.ffn.gate",
    "model.layers.N.mlp.up_proj": "layers.N.ffn.up",
    "model.layers.N.mlp.down_proj": "layers.N.ffn.down",
}
_GPT2 = {
    "transformer.wte": "embedding",
    "transformer.wpe": "positions",
    "transformer.ln_f": "norm",
    "lm_head": "head",
    "transformer.h.N.ln_1": "layers.N.attention_norm",
    "transformer.h.N.attn.c_attn": "layers.N.attention.query+key+value",
    "transformer.h.N.attn.c_proj": "layers.N.attention.output",
    "transformer.h.N.ln_2": "layers.N.ffn_norm",
    "transformer.h.N.mlp.c_fc": "layers.N.ffn.up",
    "transformer.h.N.mlp.c_proj": "layers.N.ffn.down",
}
_OPT = {
    "model.decoder.embed_tokens": "embedding",
    "model.decoder.embed_positions": "positions",
    "model.decoder.final_layer_norm": "norm",
    "lm_head": "head",
    "model.decoder.layers.N.self_attn_layer_norm": "layers.N.attention_norm",
    "model.decoder.layers.N.self_attn.q_proj": "layers.N.attention.query",
    "model.decoder.layers.N.self_attn.k_proj": "layers.N.attention.key",
    "model.decoder.layers.N.self_attn.v_proj": "layers.N.attention.value",
    "model.decoder.layers.N.self_attn.out_proj": "layers.N.attention.output",
    "model.decoder.layers.N.final_layer_norm": "layers.N.ffn_norm",
    "model.decoder.layers.N.fc1": "layers.N.ffn.up",
    "model.decoder.layers.N.fc2": "layers.N.ffn.down",
}
NAMES = {"gpt2": _GPT2, "opt": _OPT}  # all others use Llama's names

# Tensors of older checkpoints that are not weights: masks and tables that are computed.
_BUFFERS = re.compile(r"(\.attn\.(bias|masked_bias)|\.rotary_emb\.inv_freq|\.position_ids)$")


_NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # the dtypes of stored weights
_ENDS = ("embedding.weight", "head.weight")  # one shared matrix in a tied checkpoint


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run, with its configuration and tokenizer."""

    model: Transformer
    tokenizer: Tokenizer
    checkpoint: Checkpoint

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def ending(self) -> Ending:
        """Return what ends a text of this model: its EOS ids and the tokenizer."""
        return Ending(self.tokenizer.eos_ids, self.tokenizer)


def load(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    format: Format | None = None,
    quant_head: bool = False,
    *,
    as_stored: bool = False,
    part: Callable[[ModelConfig], Shard] | None = None,
) -> LoadedModel:
    """Load an embedded model's name, a folder or a hub id, in the given dtype on the given device.

    With `format`, its matrices are rounded to nearest as they come, the output matrix too if `quant_head`.
    `as_stored` keeps matrices output-major, as files have them, for kernels that pack them; some then are views of the
    file. torch's products on a CPU want them laid out by `weights.reserve`. `part` returns the part to load of a model.
    """
    checkpoint = open_checkpoint(name, ModelConfig.from_hf)
    tokenizer = Tokenizer.load(checkpoint.folder, checkpoint.config, checkpoint.generation_config)
    config = ModelConfig.from_hf(checkpoint.config)
    if note := context_note(checkpoint.config):
        print(f"{note} ({name})", file=sys.stderr)
    tokenizer.refuse_from(config.vocab_size, name)  # tokenizer files often have one more token, for padding
    scheme = scheme_of(checkpoint)
    if is_quantized(checkpoint) and format is not None:
        raise UserError(f"{name} is quantised already; leave out --quant, or quantise the model it came from")
    if is_quantized(checkpoint) and part is not None and part(config).mode == "reduce":
        raise UserError(f"{name} is quantised, and its groups of weights are not split: use --tensor-mode gather")
    if is_quantized(checkpoint) and scheme is None:
        model = load_quantized(checkpoint, config, dtype, device, part)
    else:
        model = load_transformer(checkpoint, config, dtype, device, format, quant_head, scheme, as_stored, part)
    return LoadedModel(model, tokenizer, checkpoint)


def load_transformer(
    checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, device: torch.device, format: Format | None = None,
    quant_head: bool = False, scheme: Scheme | None = None, as_stored: bool = False,
    part: Callable[[ModelConfig], Shard] | None = None,
) -> Transformer:  # fmt: skip
    """Load the checkpoint's weights into a model. UserError names tensors that are missing, unknown or misshapen.

    With `scheme`, the file holds matrices quantised by another tool.
    """
    config = whole_config = with_stored_head(checkpoint, config)
    shard = None if part is None else part(config)
    config = shard.local if shard else config
    with torch.device("meta"):  # names and shapes only; wrong sizes in config.json allocate no memory
        model = shard.cut(Transformer(config)) if shard else Transformer(config)
    if scheme is not None:
        _make_room(model, checkpoint, scheme, device, shard)
    packed = dict(model.named_buffers())  # the tensors of quantised matrices
    reserved = {**dict(model.named_parameters()), **packed}
    expected, filled = places(reserved, config), dict[str, Tensor]()
    whole, orders = dict(expected), defaultdict[str, list[Tensor]](list)
    to_round = {f"{linear}.weight" for linear in linear_names(model, quant_head)} if format else set()
    unknown: list[str] = []
    for stored_name, stored in checkpoint.tensors() if scheme is None else repacked(checkpoint, scheme):
        if _BUFFERS.search(stored_name) or (whole_config.tied and stored_name == "lm_head.weight"):
            continue
        if stored.dtype not in _NUMBERS and not (scheme and stored_name.endswith((".values", ".order"))):
            raise UserError(
                f"{checkpoint.name}: tensor {stored_name} holds {stored.dtype}, which needs scales; "
                "supported are float32, bfloat16, float16 (and float64): use the unquantised model"
            )
        parts = list(_translate(stored_name, stored, config))
        if not parts:
            unknown.append(stored_name)
        parts = [mine for each in parts if (mine := shard.part(*each))] if shard else parts
        for name, tensor in parts:
            matrix = whole.get(f"{name.removesuffix('.order')}.values")
            if name.endswith(".order") and matrix is not None:  # the parts of a fused matrix share one order
                orders[matrix.name.removesuffix(".values")].append(tensor)
                continue
            place, columns = expected.pop(name, None), shard.columns(name) if shard else slice(None)
            read, tensor = tensor, tensor[:, columns] if tensor.ndim == 2 else tensor
            if place is None and scheme is not None and name.endswith(".bias") and not bool(tensor.any()):
                continue  # early GPTQ tools wrote a zero bias for every matrix
            if place is None:
                unknown.append(stored_name)
            elif place.shape != tensor.shape:
                raise UserError(
                    f"{checkpoint.name}: tensor {stored_name} has shape {list(tensor.shape)}, "
                    f"config.json asks for {list(place.shape)}"
                )
            elif format and place.name in to_round:
                quantized = quantized_linear(model, place.name.removesuffix(".weight"), format, device)
                quantized.round_rows(place.rows.start or 0, read, stored_name, columns)
            elif as_stored and place.name not in packed and is_whole(place, tensor, dtype):
                replace(model, place.name, nn.Parameter(tensor, requires_grad=False))
            else:
                if place.name not in filled:
                    shape, ready = reserved[place.name].shape, packed.get(place.name)
                    made = _assign(model, place.name, shape, dtype, device, as_stored) if ready is None else ready
                    filled[place.name] = made
                fill(filled[place.name][place.rows], tensor)
    for name, found in orders.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, QuantLinear)
        set_order(linear, found, f"{checkpoint.name}: {name}")
    if config.tied:
        model.head.weight = model.embedding.weight
        expected.pop("head.weight", None)
    if shard is not None:
        shard.complete(model, expected, dtype, device)
    if expected or unknown:
        raise UserError(_complaint(checkpoint, config, sorted(expected), unknown))
    if config.tied and format and quant_head:
        quantize_linear(model, "head", format)
    return model.eval()


def _make_room(
    model: Transformer, checkpoint: Checkpoint, scheme: Scheme, device: torch.device, shard: Shard | None
) -> None:
    """Put a QuantLinear in place of every quantised matrix. UserError if only a part of a fused matrix is quantised."""
    whole = places(dict(model.named_parameters()), model.config)
    parts = Counter(place.name for place in whole.values())
    stored = [f"{owner}.weight" for owner in quantised(checkpoint, scheme)]
    parts_of = [part for each in stored for part in _translate(each, torch.empty(3), model.config)]
    mine = [shard.part(*part) for part in parts_of] if shard else parts_of
    names = [part[0] for part in mine if part and part[0] in whole]
    for name, count in Counter(whole[name].name for name in names).items():
        linear = model.get_submodule(name.removesuffix(".weight"))
        if not isinstance(linear, nn.Linear) or count < parts[name]:
            raise UserError(
                f"{checkpoint.name}: {name.removesuffix('.weight')} is not quantised, or only in part, and the "
                "engine computes it as one matrix: take the model as it was before"
            )
        shape, bias = (linear.out_features, linear.in_features), linear.bias is not None
        format = format_of(scheme, linear.in_features, f"{checkpoint.name}: {name.removesuffix('.weight')}")
        replace(model, name.removesuffix(".weight"), QuantLinear(shape, format, bias, False, device))


def with_stored_head(checkpoint: Checkpoint, config: ModelConfig) -> ModelConfig:
    """Return the configuration, untied if the file holds an output matrix that differs from its embedding.

    Some files have a wrong `tie_word_embeddings`; like transformers, the engine trusts the tensors.
    """
    if not config.tied:
        return config
    stored = dict[str, Tensor]()
    for stored_name, tensor in checkpoint.tensors():
        if stored_name.endswith(".weight"):
            stored |= {name: part for name, part in _translate(stored_name, tensor, config) if name in _ENDS}
        if len(stored) == len(_ENDS):
            return config if torch.equal(*stored.values()) else dataclasses.replace(config, tied=False)
    return config


def _translate(stored_name: str, stored: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield our name and layout of one stored tensor: none if it is unknown, three if it holds query, key and value."""
    names = NAMES.get(config.family, _LLAMA)
    module, _, kind = stored_name.rpartition(".")
    number = re.search(r"\.(\d+)\.", f".{module}.")
    key = re.sub(r"(^|\.)\d+\.", r"\1N.", module, count=1)
    ours = names.get(key) or names.get(f"transformer.{key}") or names.get(f"model.{key}")
    if ours is None or kind not in ("weight", "bias", *PARTS):
        return
    ours = ours.replace("N", number[1]) if number else ours
    if config.family == "gpt2" and kind == "weight" and stored.ndim == 2 and "layers" in ours:
        stored = stored.T  # GPT-2 stores its matrices as Conv1D: [in, out]
    if "+" in ours:
        prefix, _, last = ours.rpartition(".")
        pieces = [stored] * 3 if kind == "order" else torch.atleast_1d(stored).tensor_split(3)
        for part, tensor in zip(last.split("+"), pieces, strict=True):
            yield f"{prefix}.{part}.{kind}", tensor
    else:
        yield f"{ours}.{kind}", stored


def _assign(
    model: Transformer, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, as_stored: bool
) -> Tensor:
    """Allocate a parameter; values are copied into it later, and cast to its dtype."""
    inside = name.startswith("layers.") and not as_stored
    tensor = reserve(shape, dtype, device) if inside else torch.empty(shape, dtype=dtype, device=device)
    replace(model, name, nn.Parameter(tensor, requires_grad=False))
    return tensor


def is_whole(place: Place, tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a layer's matrix can be read from the mapped file: it is no part of a fused one, and not cast."""
    inside = place.name.startswith("layers.") and place.rows == slice(None)
    return inside and tensor.ndim == 2 and tensor.dtype == dtype and tensor.is_contiguous()


def _complaint(checkpoint: Checkpoint, config: ModelConfig, missing: list[str], unknown: list[str]) -> str:
    def some(names: list[str]) -> str:
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    parts = [f"{checkpoint.name}: the weights do not fit a {config.family} model"]
    if missing:
        parts.append(f"missing: {some([_stored_name(name, config) for name in missing])}")
    if unknown:
        parts.append(f"unknown: {some(unknown)}")
    return "; ".join(parts)


def _stored_name(ours: str, config: ModelConfig) -> str:
    """Return the family's name of one of our tensors, so that an error uses the names in the user's file."""
    module, _, kind = ours.rpartition(".")
    number = re.search(r"\d+", module)
    wanted = re.sub(r"\d+", "N", module, count=1)
    for theirs, name in NAMES.get(config.family, _LLAMA).items():
        prefix, _, last = name.rpartition(".")
        if wanted in {f"{prefix}.{part}".lstrip(".") for part in last.split("+")}:
            return f"{theirs.replace('N', number[0]) if number else theirs}.{kind}"
    return ours
