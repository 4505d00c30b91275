"""The file that ``vllm-mm calibrate`` writes: rates, and where they were measured."""

from __future__ import annotations

from pathlib import Path

import msgspec

from vllm_mm_ext.planner.rates import RatesRange

VERSION = 1


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rates that were measured, and on what.

    Attributes:
        version: Of the file's format.
        model: The model that was served.
        machine: Processor and number of cores.
        device: What the model ran on.
        tp: GPUs that shared a replica.
        vllm: Version of vLLM.
        date: Day of the measurement, ISO 8601.
        steps: How many engine steps were measured.
        held_up: Share of these that something else held up; they do not count.
        step_error: Median of how far the others are from what the rates add up to, as a share.
        rates: The rates.
        dtype: Type of the weights and activations that were served; empty in older files.
    """

    version: int
    model: str
    machine: str
    device: str
    tp: int
    vllm: str
    date: str
    steps: int
    held_up: float
    step_error: float
    rates: RatesRange
    dtype: str = ""


def write(calibration: Calibration, file: Path) -> None:
    """Write a calibration as JSON.

    Args:
        calibration: What was measured.
        file: The file; its folder is made where it is missing.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(msgspec.json.format(msgspec.json.encode(calibration), indent=1) + b"\n")


def read(file: Path) -> Calibration:
    """Read what ``write`` wrote.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no calibration, or one of another version; the message says what is wrong
            where.
    """
    content = file.read_bytes()
    try:
        version = msgspec.json.decode(content, type=_Versioned).version
        if version == VERSION:
            return msgspec.json.decode(content, type=Calibration)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no file of `vllm-mm calibrate`: {error}") from error
    raise ValueError(
        f"{file} has version {version}, this one reads version {VERSION}: run `vllm-mm calibrate`"
    )


class _Versioned(msgspec.Struct):
    version: int
