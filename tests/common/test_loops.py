from __future__ import annotations

import pytest

from common.loops import loop_share


def test_loop_share() -> None:
    assert loop_share([]) == 0
    assert loop_share(list(range(100))) == 0
    assert loop_share([1, 2, 3, 4] * 10) == pytest.approx((40 - 8 + 1 - 4) / 40)  # all 8-grams but the first four
    assert loop_share(list(range(20)) + [7] * 20) == pytest.approx(12 / 40)
