"""The kernels pass the compiler's sanitizers (`make sanitize`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from phase5.kernels import cpp
from tests.support.beside import beside

sanitize = beside(5, "checks.sanitize")
pytestmark = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", sanitize.SANITIZERS)
def test_nothing_is_found(sanitizer: str, tmp_path: Path) -> None:
    assert "the same bits always" in sanitize.run(sanitizer, tmp_path)


def test_unknown_ones_are_named() -> None:
    with pytest.raises(UserError, match="unknown sanitizer 'magic'; use address, undefined, thread"):
        sanitize.main(["magic"])
