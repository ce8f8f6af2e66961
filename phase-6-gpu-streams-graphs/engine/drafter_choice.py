"""Lets each request of an engine choose its drafter: an LLM for each drafter, all with the same target.

llm = LLM(Options())
engine = LLMEngine(llm, others=[with_drafter(llm, "ngram"), with_drafter(llm, "eagle")])
engine.add_request("class Stack:", drafter="eagle")
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

from common.errors import UserError

from .options import BRANCHING, DrafterName

if TYPE_CHECKING:
    from .llm import LLM


def by_drafter(llms: Iterable[LLM]) -> dict[DrafterName, LLM]:
    """Map each drafter's name to its LLM, but for LLMs that draft nothing. UserError if two have the same drafter."""
    found: dict[DrafterName, LLM] = {}
    for each in llms:
        if each.speculative:
            name = each.options.drafter
            if name in found:
                raise UserError(f"two LLMs have the drafter {name}, and requests choose by that name: leave one out")
            found[name] = each
    return found


def with_drafter(llm: LLM, name: DrafterName) -> LLM:
    """Return an LLM with the same target and caches, this drafter, and measured costs of its own.

    A tree applies to the drafters that can branch. UserError if the drafter cannot be loaded.
    """
    other = copy.copy(llm)
    tree = llm.options.tree if name in BRANCHING else "off"
    changed = {"drafter": name, "tree": tree, "parallel_streams": False, "sync_mode": "event"}
    other.options = llm.options.model_copy(update=changed)
    other.backends = copy.copy(llm.backends)
    other.backends.heads = None
    other.load_drafter()
    if not other.speculative:
        raise UserError(f"there is no draft model for the drafter {name}: name one with --draft")
    return other
