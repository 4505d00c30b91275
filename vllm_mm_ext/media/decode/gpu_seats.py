"""Which decode workers of a pool get a GPU and which one, and for what they use it."""

from __future__ import annotations

import glob
import threading
from collections.abc import Mapping

from vllm_mm_ext.config.media_settings import DecodeConfig
from vllm_mm_ext.media.decode.decoders.nvdec_device import VISIBLE_DEVICES
from vllm_mm_ext.media.types import GpuRules


class Seat:
    """A worker's right to a GPU; the GPU's memory holds only so many workers.

    Attributes:
        device: The GPU, as ``CUDA_VISIBLE_DEVICES`` names it.
    """

    def __init__(self, device: str, seats: GpuSeats) -> None:
        self.device = device
        self._seats = seats
        self._held = True

    def release(self) -> None:
        """Give the seat back; again is no matter."""
        if self._held:
            self._held = False
            self._seats.give_back(self.device)


class GpuSeats:
    """Hands out seats, always on the GPU with the fewest taken. Safe from any thread.

    Args:
        devices: The GPUs, as ``CUDA_VISIBLE_DEVICES`` names them.
        per_device: Seats of each.
    """

    def __init__(self, devices: tuple[str, ...], per_device: int) -> None:
        self._taken = dict.fromkeys(devices, 0)
        self._per_device = per_device
        self._lock = threading.Lock()

    def take(self) -> Seat | None:
        """A seat, or None when all are taken."""
        with self._lock:
            device = min(self._taken, key=lambda name: self._taken[name], default=None)
            if device is None or self._taken[device] >= self._per_device:
                return None
            self._taken[device] += 1
        return Seat(device, self)

    def give_back(self, device: str) -> None:
        """One seat on ``device`` is free again."""
        with self._lock:
            self._taken[device] -= 1


def gpu_rules(config: DecodeConfig) -> tuple[GpuRules, int]:
    """What the configuration says of GPUs: the rules of a job, and the seats on each GPU.

    There are no seats where no job may use one.
    """
    least = config.nvdec.from_megapixels.model_dump(exclude_none=True)
    wanted = config.backend == "nvdec" or (config.backend == "auto" and bool(least))
    rules = GpuRules(config.nvdec.memory_mb << 20, tuple(least.items()))
    return rules, config.nvdec.sessions if wanted else 0


def visible_devices(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs of a server, as ``CUDA_VISIBLE_DEVICES`` would name each alone.

    Args:
        environ: The server's environment. Where it names no GPUs, the machine's device files are
            counted; where there are none either, the driver may still know a first GPU.
    """
    named = environ.get(VISIBLE_DEVICES)
    if named is None:
        return tuple(map(str, range(len(glob.glob("/dev/nvidia[0-9]*")) or 1)))
    devices = []
    for name in (part.strip() for part in named.split(",")):
        # As in CUDA: what follows a name that is not valid does not count.
        if not name or name.startswith("-"):
            break
        devices.append(name)
    return tuple(dict.fromkeys(devices))
