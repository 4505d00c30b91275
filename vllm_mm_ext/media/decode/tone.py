"""HDR and wide-gamut pictures, shown on an SDR display.

Formulas: Recommendation ITU-R BT.2100 (PQ, and HLG with its OOTF), Report ITU-R BT.2408 (reference
white of 203 cd/m2), Report ITU-R BT.2390 (the curve that fits highlights into SDR),
Recommendation ITU-R BT.2087 (BT.2020 to BT.709), Recommendation ITU-R BT.1886 (SDR's gamma of 2.4).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import SideData
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame

Floats = npt.NDArray[np.float32]

# FFmpeg's numbers of transfer functions and primaries (AVCOL_TRC_*, AVCOL_PRI_*).
_PQ, _HLG = 16, 18
_BT2020, _DISPLAY_P3 = 9, 12
# Linear RGB to linear BT.709 RGB; rows are red, green and blue of the result.
_TO_BT709 = {
    _BT2020: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    _DISPLAY_P3: ((1.2249, -0.2249, 0.0), (-0.0421, 1.0421, 0.0), (-0.0196, -0.0786, 1.0983)),
}
_LUMA = (0.2627, 0.6780, 0.0593)  # BT.2020.

# Luminances in cd/m2. HDR is mastered for 1000 unless metadata say something else, which is also
# the nominal peak of HLG, and PQ ends at 10000.
_WHITE, _USUAL_PEAK, _PQ_PEAK = 203.0, 1000.0, 10000.0
_SDR_GAMMA = 2.4
# Entries of tables over the square root of linear light, and pixels worked on at a time (a few
# temporary arrays of these stay in a core's cache).
_STEPS = 4096
_BAND = 1 << 14


@dataclass(frozen=True)
class Curve:
    """How a picture's code values become SDR.

    Attributes:
        transfer: ``_PQ``, ``_HLG``, or another one for SDR.
        primaries: ``_BT2020``, ``_DISPLAY_P3``, or another one for those of BT.709.
        peak: Luminance of the brightest white that the picture was made for, in cd/m2.
    """

    transfer: int
    primaries: int
    peak: float


def curve_of(frame: VideoFrame) -> Curve | None:
    """What a picture needs to be shown in SDR; None for one that is SDR with usual primaries."""
    transfer, primaries = frame.color_trc, frame.color_primaries
    if transfer == _HLG:
        return Curve(_HLG, primaries, _USUAL_PEAK)
    if transfer == _PQ:
        return Curve(_PQ, primaries, _mastered_peak(frame))
    return Curve(0, primaries, _WHITE) if primaries in _TO_BT709 else None


def write_sdr(codes: npt.NDArray[np.uint16], curve: Curve, out: npt.NDArray[np.uint8]) -> None:
    """Convert a picture to SDR with BT.709 primaries.

    Args:
        codes: uint16 ``[height, width, 3]`` R'G'B' in full range.
        curve: How.
        out: uint8 ``[height, width, 3]``, C-contiguous, written in place.
    """
    height, width = codes.shape[:2]
    linear, encode = _linear_table(curve.transfer), _gamma_table()
    matrix = _TO_BT709.get(curve.primaries)
    to_bt709 = None if matrix is None else np.array(matrix, np.float32).T
    step = max(1, _BAND // width)
    for top in range(0, height, step):
        light = linear.take(codes[top : top + step].reshape(-1, 3), mode="clip")
        if curve.transfer == _HLG:
            # The OOTF: the display's gamma of 1.2 acts on luminance.
            luminance = light @ np.array(_LUMA, np.float32)
            light *= (np.power(luminance, np.float32(0.2)) * (_USUAL_PEAK / _WHITE))[:, None]
        if curve.peak > _WHITE:
            # The same factor for all three keeps the hue.
            brightest = np.maximum(np.maximum(light[:, 0], light[:, 1]), light[:, 2])
            brightest *= np.float32(_WHITE / curve.peak)
            light *= _ratio_table(curve.peak).take(_index(brightest), mode="clip")[:, None]
        if to_bt709 is not None:
            light = light @ to_bt709
        encode.take(_index(light), mode="clip", out=out[top : top + step].reshape(-1, 3))


def _index(light: Floats) -> npt.NDArray[np.int32]:
    """Places of 0 to 1 in a table over the square root; ``light`` is overwritten."""
    np.maximum(light, 0, out=light)
    np.sqrt(light, out=light)
    light *= _STEPS - 1
    light += 0.5
    return light.astype(np.int32)


@lru_cache(maxsize=4)
def _linear_table(transfer: int) -> Floats:
    """Linear light of each 16-bit code: 1 is SDR's white, for HLG the scene's white."""
    code = np.arange(1 << 16) / 65535
    if transfer == _PQ:
        light = _from_pq(code) / _WHITE
    elif transfer == _HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    else:
        light = code**_SDR_GAMMA
    return light.astype(np.float32)


@lru_cache(maxsize=1)
def _gamma_table() -> npt.NDArray[np.uint8]:
    code = (np.arange(_STEPS) / (_STEPS - 1)) ** (2 / _SDR_GAMMA)
    return np.round(255 * code).astype(np.uint8)


@lru_cache(maxsize=16)
def _ratio_table(peak: float) -> Floats:
    """By what BT.2390's curve multiplies light, over the square root of light divided by peak."""
    light = np.maximum((np.arange(_STEPS) / (_STEPS - 1)) ** 2 * peak, 1e-4)
    before = _to_pq(light) / _to_pq(np.array(peak))
    top = float(_to_pq(np.array(_WHITE)) / _to_pq(np.array(peak)))
    knee = max(0.0, 1.5 * top - 0.5)
    t = np.maximum((before - knee) / (1 - knee), 0)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (3 * t**2 - 2 * t**3) * top
    )
    after = _from_pq(np.where(before < knee, before, spline) * _to_pq(np.array(peak)))
    ratio: Floats = (after / light).astype(np.float32)
    return ratio


def _from_pq(code: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Luminance in cd/m2 of PQ's code values 0 to 1."""
    power = code ** (1 / _M2)
    return _PQ_PEAK * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)


def _to_pq(luminance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """PQ's code value 0 to 1 of a luminance in cd/m2."""
    power = (luminance / _PQ_PEAK) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32


def side_data(frame: VideoFrame) -> dict[SideDataType, bytes]:
    """What a picture carries beside its pixels."""
    every = cast("Iterable[SideData]", frame.side_data)
    return {data.type: bytes(data) for data in every}


def _unnamed(kinds: type[SideDataType], value: Any) -> SideDataType:
    """A kind of side data that PyAV has no name for, such as EXIF or the view of a stereo film."""
    kind = object.__new__(kinds)
    kind._name_, kind._value_ = f"UNNAMED_{value}", value
    return kind


# Without this, PyAV shows no side data of a picture where it has no name for one of them.
SideDataType._missing_ = classmethod(_unnamed)  # type: ignore[assignment]


def _mastered_peak(frame: VideoFrame) -> float:
    """The brightest pixel that metadata promise, else the brightest white of the mastering display.

    The layouts are those of FFmpeg's AVContentLightMetadata (first the brightest pixel, uint32) and
    AVMasteringDisplayMetadata (nine rationals, then the display's maximum, then two flags).
    """
    found = side_data(frame)
    peak = 0.0
    if mastering := found.get(SideDataType.MASTERING_DISPLAY_METADATA):
        values = np.frombuffer(mastering, np.int32)
        if len(values) >= 22 and values[21] and values[19]:
            peak = float(values[18]) / float(values[19])
    if content := found.get(SideDataType.CONTENT_LIGHT_LEVEL):
        peak = float(np.frombuffer(content, np.uint32)[0]) or peak
    return min(max(peak or _USUAL_PEAK, _WHITE), _PQ_PEAK)
