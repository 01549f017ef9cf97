"""Speculative decoding with MTP: tokens per step and when drafting pays.

`E[tokens per step] = 1 + p1 + p1 p2 + p1 p2 p3` with p_k the chance that draft k is accepted given
that all before it were. The built-in figures are those measured for Step 3.5 Flash in llama.cpp's
pull request 20981 (Q4_K_S, 32K): overall acceptance .877, .772 and .686 of all drafts with one,
two and three drafts; a statistics file takes their place.
"""

from __future__ import annotations

from collections.abc import Sequence

from refimpl.errors import InputError

MAX_DRAFTS = 3
# Share of all drafts accepted with 1, 2 and 3 drafts per step (llama.cpp pull request 20981).
PUBLISHED_SHARES = (0.877, 0.772, 0.686)


def conditional_acceptance(shares: Sequence[float] = PUBLISHED_SHARES) -> tuple[float, ...]:
    """Chance of each draft given all before it, from the overall shares with 1, 2, ... drafts.

    With k drafts the accepted ones number k s_k = p1 + p1 p2 + ... (k terms), so each added draft
    contributes k s_k - (k-1) s_(k-1).
    """
    found: list[float] = []
    reached, before = 1.0, 0.0
    for k, share in enumerate(shares, start=1):
        gained = max(0.0, k * share - before)
        found.append(min(1.0, gained / reached) if reached > 0 else 0.0)
        reached, before = gained, k * share
    return tuple(found)


def tokens_per_step(drafts: int, acceptance: Sequence[float] | None = None) -> float:
    """Expected tokens that one verification yields.

    Raises:
        InputError: more drafts than acceptance figures, or a figure outside 0..1.
    """
    if drafts <= 0:
        return 1.0
    chances = conditional_acceptance() if acceptance is None else tuple(acceptance)
    if any(not 0.0 <= p <= 1.0 for p in chances):
        raise InputError(f"acceptance {list(chances)} holds a value outside 0..1")
    if not chances:
        raise InputError("no acceptance figure given; state one per draft position")
    # A single published figure speaks for every later position.
    chances = (*chances, *[chances[-1]] * (drafts - len(chances)))
    total, reached = 1.0, 1.0
    for p in chances[:drafts]:
        reached *= p
        total += reached
    return total
