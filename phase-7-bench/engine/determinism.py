"""Says whether tokens are a function of the prompt, the parameters and the seed alone; `--deterministic` insists on it.

Two things can be in the way. Sums in another order have other bits: torch's depend on the batch and on the threads,
those of the kernels in C++, CUDA and Triton do not. And K may follow the clock (`--controller cost`): under `rejection`
a token depends on whether it was drafted. `coupled` draws drafts and tokens with one noise, so its tokens are plain
decoding's.

    python generate.py --deterministic --controller cost --temperature 1 --prompt "def read_config(path):"
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from common.errors import UserError

from .kernels import TORCH, Kernels

if TYPE_CHECKING:
    from .llm import LLM

EXACT = ("coupled", "longest_prefix")  # policies whose tokens do not depend on what was drafted


def why_not_reproducible(llm: LLM) -> str | None:
    """Return what the tokens depend on besides the prompt, the parameters and the seed; None for nothing."""
    options, backends = llm.options, llm.backends
    if options.beams > 1:
        return "torch computes --beams, and its bits depend on the batch and on the threads"
    if (
        llm.speculative
        and options.controller == "cost"
        and options.temperature > 0
        and options.policy_name not in EXACT
    ):
        return (
            f"under --policy {options.policy_name} tokens depend on K, which follows the clock with --controller cost; "
            "--policy coupled does not depend on it"
        )
    modules = [llm.loaded.model, *([llm.draft.model] if llm.draft else []), *([llm.heads] if llm.heads else [])]
    if all(backends.in_cpp(module) for module in modules):
        return None
    slow = torch_ops(backends.kernels) or ("the heads" if llm.heads is not None else "")
    if slow:
        return (
            f"torch computes {slow}, and its bits depend on the batch and on the threads; those of --kernels cpp, cuda "
            "and triton do not"
        )
    return None


def torch_ops(kernels: Kernels) -> str:
    """Name what torch computes, op by op unless it is all of a model; "" for nothing."""
    names = [op for op in Kernels._fields if getattr(kernels, op) is getattr(TORCH, op)]
    return "the models" if "linear" in names else ", ".join(names)


def check_deterministic(llm: LLM) -> None:
    """Raise UserError if `--deterministic` asks for what cannot be."""
    reason = why_not_reproducible(llm) if llm.options.deterministic else None
    if reason is not None:
        raise UserError(f"--deterministic cannot be: {reason}")


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let torch refuse operations whose results differ from run to run. UserError with the name of one."""
    if not wanted:
        yield
        return
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms imports the compiler too, for 2 seconds
    try:
        yield
    except RuntimeError as error:
        if "deterministic" in str(error):
            raise UserError(f"--deterministic: {str(error).partition(',')[0].partition('. ')[0]}") from error
        raise
    finally:
        torch.set_deterministic_debug_mode(before)
