"""Rounds shares of a total to whole numbers that still add up to it."""

from __future__ import annotations

from collections.abc import Mapping


def apportion(total: int, quotas: Mapping[str, float], limits: Mapping[str, int]) -> dict[str, int]:
    """Whole numbers near some quotas, by the method of largest remainders.

    Args:
        total: What the numbers add up to, if the limits allow for so much; at least 0.
        quotas: The exact share of each name, about ``total`` together.
        limits: The largest number of each name, at least 0.

    Returns:
        A number for each name in ``limits``, whose order it keeps.
    """
    found: dict[str, int] = {}
    remainders: dict[str, float] = {}
    left = total
    for name, limit in limits.items():
        quota = quotas.get(name, 0.0)
        # Sums of fractions fall a little short of whole numbers.
        found[name] = max(0, min(int(quota + 1e-6), limit, left))
        remainders[name] = quota - found[name]
        left -= found[name]
    order = sorted(found, key=lambda name: -remainders[name])
    # One each first; more only where quotas and limits leave no other way.
    for most in (1, left):
        for name in order:
            more = min(most, limits[name] - found[name], left)
            found[name] += more
            left -= more
    return found
