"""What an LLM does with a group of processes: it starts them, and loads models on all of them."""

from __future__ import annotations

import dataclasses
from weakref import finalize

import torch

from common.errors import UserError

from ..backends import Backends
from ..config import ModelConfig
from ..load import LoadedModel, load
from ..options import Options
from ..quantize import Format
from .group import Group, uninterrupted
from .messages import Load
from .shard import Shard
from .start import start, wanted


def lead(llm: object, options: Options, backends: Backends) -> Group | None:
    """Start the other processes, which end with the LLM; None if its model is not split. UserError: see `start`."""
    mode, ranks = wanted(options)
    if ranks > 1 and not backends.whole_steps:
        why = backends.report["why_no_cpp_step"]
        raise UserError(f"only the C++ kernels split a model over processes, and they do not run here: {why}")
    if (group := start(options)) is not None:
        finalize(llm, group.close)
        backends.group = group
        backends.report["ranks"], backends.report["split"] = ranks, mode
    return group


def load_parts(
    group: Group | None,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    format: Format | None,
    quant_head: bool,
    as_stored: bool,
) -> LoadedModel:
    """Load a model whole, or of a group each rank's part; return rank 0's. Arguments as for `load`.

    UserError, on every rank, if one of them cannot.
    """
    if group is None:
        return load(name, dtype, device, format, quant_head, as_stored=as_stored)
    what = Load(name, dtype, format, quant_head)
    with uninterrupted():
        group.tell(what)
        return load_part(group, what, device)


def load_ends(
    group: Group, name: str, dtype: torch.dtype, device: torch.device, format: Format | None, quant_head: bool
) -> LoadedModel:
    """Load the target without its layers, with the whole model's configuration, once for all drafters of the group.

    Arguments as for `load`.
    """
    if group.ends is None:
        loaded = load(name, dtype, device, format, quant_head, as_stored=True, part=Shard.ends)
        whole = ModelConfig.from_hf(loaded.checkpoint.config)
        loaded.model.config = dataclasses.replace(loaded.config, layers=whole.layers)
        group.ends = loaded
    return group.ends


def load_part(group: Group, what: Load, device: torch.device) -> LoadedModel:
    """Load this rank's part of a model. UserError, on every rank, if one of them cannot."""
    error: str | None = None
    try:
        loaded = load(what.name, what.dtype, device, what.format, what.quant_head, as_stored=True, part=group.shard)
        group.shards[loaded.model] = group.shard(ModelConfig.from_hf(loaded.checkpoint.config))
        return loaded
    except Exception as failure:
        error = str(failure) if isinstance(failure, UserError) else f"{type(failure).__name__}: {failure}"
        raise
    finally:
        group.agree(error)
