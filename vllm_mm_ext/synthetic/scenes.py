"""Pictures with known content: backgrounds and sub-second events, as small YUV planes.

Scenes are drawn at a fraction of the clip's size and enlarged, so that a minute of 720p takes
seconds to make. A scene returns the *same* object while its picture does not change, which lets
the encoder side skip the enlarging.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

SceneName = Literal[
    "static", "shapes", "talking_head", "fade", "noise", "flicker", "cuts", "pan", "black"
]
EventKind = Literal["flash", "region_flash", "object", "insert"]
SCENES: tuple[SceneName, ...] = get_args(SceneName)
EVENT_KINDS: tuple[EventKind, ...] = get_args(EventKind)

Plane = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Picture:
    """Luma and chroma of one picture, all ``[h, w]`` at drawing size (chroma not subsampled)."""

    y: Plane
    u: Plane
    v: Plane

    def copy(self) -> Picture:
        return Picture(self.y.copy(), self.u.copy(), self.v.copy())


@dataclass(frozen=True)
class Event:
    """Something that is visible only from ``start`` to ``end`` seconds.

    Attributes:
        kind: ``flash`` brightens the whole frame, ``region_flash`` a box of about 12 % of each
            side, ``object`` shows a slowly moving disc of about 9 % of the height, ``insert``
            shows another picture altogether.
        start, end: Seconds; visible in frames with ``start <= time < end``.
        colour_only: Whether what appears is as bright as what it hides.
    """

    kind: EventKind
    start: float
    end: float
    colour_only: bool = False


def random_events(
    seed: int,
    duration: float,
    kinds: Sequence[EventKind],
    *,
    length: tuple[float, float] = (0.2, 0.8),
    margin: float = 1.0,
) -> tuple[Event, ...]:
    """One event per entry of ``kinds``, in time order, at random times that do not touch.

    Args:
        seed: Seed of the times and lengths.
        duration: Seconds of the clip.
        kinds: Kind of each event.
        length: Shortest and longest event in seconds.
        margin: Seconds kept free at both ends of the clip and around each event.

    Raises:
        ValueError: the clip is too short for that many events.
    """
    rng = np.random.default_rng(seed)
    slot = (duration - 2 * margin) / max(1, len(kinds))
    if slot < length[1] + 2 * margin and kinds:
        raise ValueError(f"{len(kinds)} events of up to {length[1]} s do not fit {duration} s")
    events = []
    for position, kind in enumerate(kinds):
        long = float(rng.uniform(*length))
        first = margin + position * slot + margin
        start = float(rng.uniform(first, first + slot - long - 2 * margin))
        events.append(Event(kind, round(start, 3), round(start + long, 3)))
    return tuple(events)


class Scene:
    """A background with events on it. ``picture(time)`` is pure: any order, same answer.

    Args:
        name: One of ``SCENES``.
        height, width: Drawing size in pixels.
        duration: Seconds, for placing the cuts of ``cuts``.
        events: Events to draw over the background.
        seed: Seed of all the random choices.

    Attributes:
        cuts: Seconds at which ``cuts`` changes picture (empty for other scenes).
        noise_sigma: Standard deviation of sensor noise that the encoder side should add per
            full-size pixel (0 for other scenes than ``noise``), in 8-bit steps.
    """

    def __init__(
        self,
        name: SceneName,
        height: int,
        width: int,
        *,
        duration: float,
        events: Sequence[Event] = (),
        seed: int = 0,
    ) -> None:
        if name not in SCENES:
            raise ValueError(f"unknown scene {name!r}; one of {', '.join(SCENES)}")
        self.height, self.width, self.events, self.seed = height, width, tuple(events), seed
        self._rng = np.random.default_rng(seed)
        self._still = self._texture()
        self._inserted = self._texture()
        self._spots = [
            (float(a), float(b)) for a, b in self._rng.uniform(0.15, 0.85, (len(self.events), 2))
        ]
        self.cuts: tuple[float, ...] = ()
        self._stills = [self._still]
        if name == "cuts":
            self.cuts = self._cut_times(duration)
            self._stills += [self._texture() for _ in self.cuts]
        self.noise_sigma = 6.0 if name == "noise" else 0.0
        self._phase = self._rng.uniform(0, 2 * math.pi, 8)
        self._rate = float(self._rng.uniform(0.8, 1.2))
        draw: dict[SceneName, Callable[[float], Picture]] = {
            "shapes": self._shapes,
            "talking_head": self._talking_head,
            "fade": self._fade,
            "flicker": self._flicker,
            "cuts": self._cut,
            "pan": self._pan,
            "black": self._black,
        }
        self._draw = draw.get(name, self._unchanged)
        self._dark = Picture(
            np.full((height, width), 16, np.uint8),
            np.full((height, width), 128, np.uint8),
            np.full((height, width), 128, np.uint8),
        )

    def picture(self, time: float) -> Picture:
        """The picture at ``time`` seconds."""
        drawn = self._draw(time)
        for event, spot in zip(self.events, self._spots, strict=True):
            if event.start <= time < event.end:
                drawn = self._with_event(drawn, event, spot, time)
        return drawn

    def _texture(self) -> Picture:
        """A gradient with some boxes: neither flat nor hard to encode."""
        rng, h, w = self._rng, self.height, self.width
        slope = rng.uniform(-40, 40, 2)
        rows = np.linspace(-0.5, 0.5, h)[:, None] * slope[0]
        columns = np.linspace(-0.5, 0.5, w)[None, :] * slope[1]
        y = rng.uniform(80, 140) + rows + columns
        u = np.full((h, w), rng.integers(100, 156), np.uint8)
        v = np.full((h, w), rng.integers(100, 156), np.uint8)
        for _ in range(12):
            top, left = int(rng.integers(0, h)), int(rng.integers(0, w))
            box = np.s_[
                top : top + int(rng.integers(2, max(3, h // 4))),
                left : left + int(rng.integers(2, max(3, w // 4))),
            ]
            y[box] += rng.uniform(-50, 50)
            u[box] = rng.integers(90, 166)
            v[box] = rng.integers(90, 166)
        # Room on both sides: noise is added without a clip, and a flash must stay visible.
        return Picture(np.clip(y, 45, 185).astype(np.uint8), u, v)

    def _cut_times(self, duration: float) -> tuple[float, ...]:
        times: list[float] = []
        now = 0.0
        while True:
            now += float(self._rng.uniform(3.0, 9.0))
            if now >= duration:
                return tuple(times)
            times.append(round(now, 3))

    def _disc(self, centre_y: float, centre_x: float, radius: float) -> npt.NDArray[np.bool_]:
        rows = np.arange(self.height)[:, None] - centre_y
        columns = np.arange(self.width)[None, :] - centre_x
        inside: npt.NDArray[np.bool_] = rows**2 + columns**2 <= radius**2
        return inside

    def _shapes(self, time: float) -> Picture:
        out, h, w = self._still.copy(), self.height, self.width
        for k in range(3):
            angle = self._phase[k] + time * self._rate * (0.9 + 0.4 * k)
            y, x = h * (0.5 + 0.35 * math.sin(angle)), w * (0.5 + 0.4 * math.cos(angle * 0.7))
            mask = self._disc(y, x, h * (0.06 + 0.03 * k))
            out.y[mask], out.u[mask], out.v[mask] = 60 + 50 * k, 90 + 40 * k, 170 - 40 * k
        return out

    def _talking_head(self, time: float) -> Picture:
        out, h, w = self._still.copy(), self.height, self.width
        y = h * (0.5 + 0.008 * math.sin(time * 2.1 * self._rate + self._phase[0]))
        x = w * (0.5 + 0.008 * math.sin(time * 1.3 * self._rate + self._phase[1]))
        face = self._disc(y, x, h * 0.25)
        out.y[face], out.u[face], out.v[face] = 165, 110, 150
        opening = abs(math.sin(time * 9.0 * self._rate)) * h * 0.03
        top, half = round(y + h * 0.1), round(w * 0.04)
        mouth = np.s_[top : top + 1 + round(opening), round(x) - half : round(x) + half]
        out.y[mouth], out.v[mouth] = 60, 170
        return out

    def _scaled(self, gain: float) -> Picture:
        y = (self._still.y.astype(np.float32) * gain).clip(16, 235).astype(np.uint8)
        return Picture(y, self._still.u, self._still.v)

    def _fade(self, time: float) -> Picture:
        period = 10.0 * self._rate
        return self._scaled(0.65 + 0.35 * math.cos(2 * math.pi * time / period + self._phase[0]))

    def _flicker(self, time: float) -> Picture:
        return self._scaled(1.0 + 0.08 * math.sin(2 * math.pi * 5.0 * self._rate * time))

    def _cut(self, time: float) -> Picture:
        return self._stills[sum(cut <= time for cut in self.cuts)]

    def _pan(self, time: float) -> Picture:
        shift = round(time * self.width * 0.06 * self._rate)
        still = self._still
        return Picture(*(np.roll(plane, shift, axis=1) for plane in (still.y, still.u, still.v)))

    def _unchanged(self, _time: float) -> Picture:
        return self._still

    def _black(self, _time: float) -> Picture:
        return self._dark

    def _with_event(
        self, under: Picture, event: Event, spot: tuple[float, float], time: float
    ) -> Picture:
        h, w = self.height, self.width
        if event.kind == "insert":
            shown = self._inserted
            return Picture(under.y, shown.u, shown.v) if event.colour_only else shown
        out = under.copy()
        if event.kind == "flash":
            self._flash(out, np.s_[:, :], 70, event.colour_only)
        elif event.kind == "region_flash":
            top, left = round((h - h * 0.12) * spot[0]), round((w - w * 0.12) * spot[1])
            box = np.s_[top : top + max(1, round(h * 0.12)), left : left + max(1, round(w * 0.12))]
            self._flash(out, box, 80, event.colour_only)
        else:
            drift = (time - event.start) * 0.03 * w
            mask = self._disc(h * spot[0], w * spot[1] + drift, max(1.0, h * 0.045))
            dark = out.y[mask].mean() > 110 if mask.any() else False
            out.u[mask], out.v[mask] = 80, 190
            if not event.colour_only:
                out.y[mask] = 35 if dark else 205
        return out

    @staticmethod
    def _flash(out: Picture, box: tuple[slice, slice], by: int, colour_only: bool) -> None:
        """Brighten a part of a picture, or redden it."""
        plane = out.v if colour_only else out.y
        plane[box] = np.minimum(plane[box].astype(np.uint16) + by, 235)
