"""Accuracy against tokens as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Curve:
    """One line, or one point.

    Attributes:
        name: In the legend.
        points: Visual tokens of a clip, accuracy over all tasks and over those about short
            events, both in per cent.
    """

    name: str
    points: tuple[tuple[float, float, float], ...]


def write_plot(curves: Sequence[Curve], target: Path) -> Path:
    """Write the picture, one panel for all tasks and one for short events; returns ``target``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for index, (panel, title) in enumerate(
        zip(panels, ("mean over all tasks", "short events"), strict=True), 1
    ):
        for number, curve in enumerate(curves):
            panel.plot(
                [point[0] for point in curve.points],
                [point[index] for point in curve.points],
                "-" if len(curve.points) > 1 else "none",
                marker="o" if len(curve.points) > 1 else "Ds^vP"[number % 5],
                color=f"C{number}",
                label=curve.name,
            )
        panel.set(title=title, xlabel="visual tokens of a clip")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("right answers, %")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize="small")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target
