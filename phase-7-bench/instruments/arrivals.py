"""When requests arrive: a schedule that is fixed before the load begins, and depends on the seed alone.

An open loop sends at these times whether or not the server has answered. A client that waits for the answer before it
sends the next request would measure only what the server lets it measure (coordinated omission, Tene 2013).

    python -c "from instruments.arrivals import *; print(schedule('poisson', rate=4, count=5, seed=0))"
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from common.errors import UserError

Arrivals = Literal["poisson", "bursts", "even"]
BURST = 8  # requests that arrive together


def schedule(arrivals: Arrivals, rate: float, count: int, seed: int) -> list[float]:
    """Return `count` arrival times in seconds from 0, in order, at `rate` requests per second in the mean.

    poisson: independent arrivals. bursts: BURST requests at once, and the bursts as a Poisson process. even: a clock.
    """
    if not 0 < rate < float("inf") or count < 1:
        raise UserError(
            f"a load has at least 1 request and a rate above 0; got {count} requests at {rate:g} per second"
        )
    random = np.random.default_rng(seed)
    if arrivals == "even":
        gaps = np.full(count, 1 / rate)
    elif arrivals == "poisson":
        gaps = random.exponential(1 / rate, count)
    else:
        gaps = np.zeros(count)
        gaps[::BURST] = random.exponential(BURST / rate, len(gaps[::BURST]))
    times = np.cumsum(gaps)
    return [float(time) for time in times - times[0]]
