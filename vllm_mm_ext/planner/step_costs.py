"""What an engine step costs by what is in it, and the fit of these costs to measured steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from vllm_mm_ext.planner.step_contents import StepContents

NotNegative = Annotated[float, msgspec.Meta(ge=0)]
# Steps that took longer than this multiple of what is expected were held up by something else.
_HELD_UP = 1.3
# Weight of a step that took longer than expected, while it is not known yet which were held up.
_SUSPECT = 0.1
_ROUNDS = 8
# Shares of steps, by how much they took over what was expected, that are outside of the range.
_TAILS = (0.1, 0.9)


class StepCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of a step as a sum: ``step`` of each one, the others for each of its contents."""

    step: NotNegative
    decodes: NotNegative
    decode_context: NotNegative
    prompts: NotNegative
    prefill: NotNegative
    pairs: NotNegative
    encodes: NotNegative
    items: NotNegative
    vision: NotNegative
    vision_pairs: NotNegative
    audio: NotNegative
    # Files of earlier versions do not have it.
    inputs: NotNegative = 0.0

    def seconds(self, contents: StepContents) -> float:
        """How long a step takes."""
        step, *prices = msgspec.structs.astuple(self)
        held = msgspec.structs.astuple(contents)
        total = step + sum(price * count for price, count in zip(prices, held, strict=True))
        return float(total)


class StepFit(msgspec.Struct, frozen=True):
    """Costs that explain measured steps.

    Attributes:
        costs: The costs.
        error: Median of how far steps are from what the costs add up to, as a share.
        low, high: What a step took over what the costs add up to, where one in ten took less, and
            where one in ten took more.
        steps: How many steps were measured.
        held_up: Share of these that something else held up; they count for nothing here.
    """

    costs: StepCosts
    error: float
    low: float
    high: float
    steps: int
    held_up: float


def fit(steps: Sequence[tuple[StepContents, float]]) -> StepFit:
    """Costs that explain measured steps best.

    Args:
        steps: What each step held, and the seconds it took.

    Raises:
        ValueError: There are fewer steps than costs.
    """
    held = [msgspec.structs.astuple(contents) for contents, _ in steps]
    prices, ratios = fit_prices(held, [seconds for _, seconds in steps])
    low, high = (float(value) for value in np.quantile(ratios, _TAILS))
    return StepFit(
        StepCosts(*prices),
        float(np.median(np.abs(1 / ratios - 1))),
        low,
        high,
        len(steps),
        1 - len(ratios) / len(steps),
    )


def fit_prices(
    held: Sequence[Sequence[float]], seconds: Sequence[float]
) -> tuple[list[float], npt.NDArray[np.float64]]:
    """Non-negative prices that explain how long steps took; a step's error counts as a share of it.

    Args:
        held: What each step held, ``[steps, contents]``.
        seconds: How long each step took.

    Returns:
        Seconds of each step as such, then of one unit of each of its contents; and of the steps
        that nothing else held up, what they took over what the prices add up to.

    Raises:
        ValueError: There are fewer steps than prices.
    """
    rows = np.array([(1.0, *contents) for contents in held])
    took = np.array(seconds)
    if len(rows) < rows.shape[1]:
        raise ValueError(f"{len(rows)} steps cannot tell {rows.shape[1]} costs")
    shares = rows / took[:, None]
    # Columns of one size, for the numbers' sake.
    scale = np.maximum(shares.max(axis=0), 1e-12)
    weights = np.ones(len(took))
    for number in range(_ROUNDS):
        prices = non_negative(weights[:, None] * shares / scale, weights) / scale
        ratios = took / np.maximum(rows @ prices, 1e-12)
        late = ratios > (_HELD_UP if number >= _ROUNDS // 2 else 1.0)
        weights = np.where(late, 0.0 if number >= _ROUNDS // 2 else _SUSPECT, 1.0)
    return [float(price) for price in prices], ratios[ratios <= _HELD_UP]


def non_negative(
    rows: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Solve least squares over non-negative numbers (Lawson and Hanson, 1974, chapter 23).

    Args:
        rows: Coefficients ``[n, m]``.
        wanted: What they should add up to, ``[n]``.

    Returns:
        The solution ``[m]``.
    """
    columns = rows.shape[1]
    found = np.zeros(columns)
    used = np.zeros(columns, bool)
    gram, right = rows.T @ rows, rows.T @ wanted
    tolerance = 1e-10 * max(1.0, float(np.abs(right).max(initial=0.0)))
    for _ in range(3 * columns):
        slope = np.where(used, -np.inf, right - gram @ found)
        best = int(np.argmax(slope))
        if slope[best] <= tolerance:
            break
        used[best] = True
        while used.any():
            trial = np.zeros(columns)
            solved = np.linalg.lstsq(gram[np.ix_(used, used)], right[used], rcond=None)[0]
            trial[used] = solved
            if (trial[used] > 0).all():
                found = trial
                break
            # As far towards the trial as nothing turns negative; what is 0 there is not used.
            falling = used & (trial <= 0)
            step = float(
                (found[falling] / np.maximum(found[falling] - trial[falling], 1e-300)).min()
            )
            found = found + step * (trial - found)
            used &= found > 1e-15
            found[~used] = 0.0
    return found
