"""Two sets of errors on the same figures: how much one differs from the other, and how surely.

Figures of one source come from one bench and are not independent, so that the bootstrap draws
whole sources (or sweeps), each with both of its errors: what both sets share cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

DRAWS = 1000
SEED = 7
INTERVAL = 0.90


def change_of(
    before: Sequence[float] | Array,
    after: Sequence[float] | Array,
    groups: Sequence[str],
    statistic: Callable[[Any], Any],
) -> tuple[float, float, float]:
    """Change of a statistic from `before` (N,) to `after` (N,), and its interval.

    Args:
        groups: (N,) what each figure belongs to; drawn whole.
        statistic: of an array of errors, such as `numpy.median`.

    Returns:
        the change, and the bounds that hold `INTERVAL` of the draws.
    """
    import numpy as np

    both = np.array([before, after], dtype=np.float64)  # (2, N)
    _, at = np.unique(groups, return_inverse=True)
    members = [np.flatnonzero(at == g) for g in range(int(at.max()) + 1)]
    rng = np.random.default_rng(SEED)
    found = []
    for drawn in rng.integers(0, len(members), (DRAWS, len(members))):
        rows = np.concatenate([members[g] for g in drawn])
        found.append(statistic(both[1, rows]) - statistic(both[0, rows]))
    low, high = np.quantile(found, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2])
    return float(statistic(both[1]) - statistic(both[0])), float(low), float(high)
