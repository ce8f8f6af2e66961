"""Make Triton's interpreter faster, with the same results.

At every launch, and at every call of a function within a kernel, it lists all members of triton.language to replace
them; and it converts bfloat16 bit by bit.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Let the interpreter list members once, and convert between bfloat16 and float32 by a shift."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert, bfloat16, float32 = interpreter._convert_float, tl.bfloat16, tl.float32

    @cache
    def names(module: Any) -> list[str]:
        """Return the builtins. The first call comes from a launch, before any of them is replaced."""
        return [name for name, member in inspect.getmembers(module) if tl.core.is_builtin(member)]

    def patch_builtin(module: Any, builder: Any, scope: Any) -> None:
        for name in names(module):
            if tl.core.is_builtin(member := getattr(module, name)):
                interpreter._patch_attr(module, name, member, builder, scope)

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (bfloat16, float32):
            return data.view(np.uint16).astype(np.uint32) << 16
        if (source, target, rounding) == (float32, bfloat16, None):  # towards zero
            return (data.view(np.uint32) >> 16).astype(np.uint16)
        return convert(data, source, target, rounding)

    patch.setattr(interpreter, "_patch_builtin", patch_builtin)
    patch.setattr(interpreter, "_convert_float", convert_float)
