"""The GPU whose video engines (NVDEC) this process may use, and what these can decode.

The pool names one GPU to a worker in ``CUDA_VISIBLE_DEVICES``; a worker without that variable uses
none. Run as a program, the module prints as JSON what it finds (for ``vllm-mm doctor``).
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import av
from av.codec.hwaccel import HWAccel, hwdevices_available

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"

# Numbers of `cudaVideoCodec` and `cudaVideoChromaFormat` in NVIDIA's cuviddec.h.
_CODECS = {"h264": 4, "hevc": 8, "vp9": 10, "av1": 11}
_CHROMAS = {"4:2:0": 1, "4:2:2": 2, "4:4:4": 3}
_BITS = (8, 10, 12)
# Seconds that the GPU is left alone after its first failure; each further one doubles them.
_FIRST_REST_S = 2.0
_LONGEST_REST_S = 300.0
# Bytes of address space for what decoders map beside what the open context has reserved.
_HEADROOM = 1 << 30


@dataclass(frozen=True)
class Ability:
    """One kind of stream that the video engines decode.

    Attributes:
        codec: FFmpeg codec name.
        chroma: ``4:2:0``, ``4:2:2`` or ``4:4:4``.
        bits: Bits of a sample.
        max_width, max_height: Of a picture, in pixels.
        max_pixels: Most pixels of a picture.
        engines: Engines of the GPU that decode this kind; 0 if the driver does not tell.
    """

    codec: str
    chroma: str
    bits: int
    max_width: int
    max_height: int
    max_pixels: int
    engines: int


class NoGpuError(Exception):
    """This process has no GPU that decodes video; the message says why."""


class Gpu:
    """The GPU of this process, with its CUDA context open. Safe from any thread.

    Attributes:
        name: What NVIDIA calls it.
        abilities: What its video engines decode.

    Raises:
        NoGpuError: There is no driver, or the driver offers no such GPU.
    """

    def __init__(self) -> None:
        if "cuda" not in hwdevices_available():
            raise NoGpuError("PyAV's FFmpeg was built without CUDA")
        try:
            # All decoders share the device's primary context, which lives as long as this object.
            self._held = accelerator().create(av.Codec("h264", "r"))
        except (av.FFmpegError, ValueError, NotImplementedError) as error:
            raise NoGpuError(_why_not() or f"FFmpeg cannot open it: {error}") from None
        self.name, self.abilities = _query()
        self._lock = threading.Lock()
        self._failures = 0
        self._rest_until = 0.0

    def ability(self, codec: str, chroma: str, bits: int) -> Ability | None:
        """What the engines can do with such streams; None: nothing."""
        wanted = (codec, chroma, bits)
        return next((a for a in self.abilities if (a.codec, a.chroma, a.bits) == wanted), None)

    @property
    def resting(self) -> bool:
        """Whether the GPU has failed so lately that it is not tried again yet."""
        with self._lock:
            return time.monotonic() < self._rest_until

    def succeeded(self) -> None:
        """Note that a file was decoded."""
        with self._lock:
            self._failures = 0

    def failed(self) -> None:
        """Note that a file could not be decoded: the GPU rests, after each failure for longer."""
        with self._lock:
            rest = min(_LONGEST_REST_S, _FIRST_REST_S * 2**self._failures)
            self._failures = min(self._failures + 1, 16)
            self._rest_until = time.monotonic() + rest


def accelerator() -> HWAccel:
    """What PyAV needs to decode on the GPU; pictures stay there until they are asked for."""
    return HWAccel("cuda", allow_software_fallback=False, is_hw_owned=True)


# The GPU once it was opened, or why there is none.
_state: Gpu | NoGpuError | None = None
# Address space that the driver has taken, whether there is a GPU or not.
_taken = 0
_state_lock = threading.Lock()


# Whether this process may be ended when the driver hangs: a decode worker, which its pool replaces.
expendable = False


@contextmanager
def watched(seconds: float) -> Iterator[None]:
    """End this process, where it is expendable, if the body takes longer than ``seconds``.

    A call into a driver that hangs cannot be given up otherwise. It may hold Python's lock, so the
    watch is one that does not need the lock.
    """
    if expendable:
        faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        if expendable:
            faulthandler.cancel_dump_traceback_later()


def has_seat() -> bool:
    """Whether this process was given a GPU."""
    return bool(os.environ.get(VISIBLE_DEVICES))


def gpu() -> Gpu:
    """The GPU of this process, opened on the first call.

    Raises:
        NoGpuError: There is none; it is not looked for again.
    """
    global _state
    with _state_lock:
        if _state is None:
            try:
                with _unlimited_address_space():
                    _state = Gpu()
            except NoGpuError as error:
                _state = error.with_traceback(None)
            except Exception as error:
                # An old driver may lack a function, for example.
                _state = NoGpuError(f"{type(error).__name__}: {error}")
        if isinstance(_state, NoGpuError):
            raise NoGpuError(*_state.args)
        return _state


def address_space() -> int:
    """Bytes of address space that the driver takes of this process; 0 while it is not loaded."""
    return _taken


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _unlimited_address_space() -> Iterator[None]:
    """Lift the limit on address space: CUDA reserves far more of it than it ever fills."""
    global _taken
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = _address_space()
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    try:
        yield
    finally:
        opened = isinstance(_state, Gpu)
        _taken = _address_space() - before + (_HEADROOM if opened else 0)
        if soft != resource.RLIM_INFINITY:
            raised = soft + _taken
            soft = raised if hard == resource.RLIM_INFINITY else min(raised, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- NVIDIA's libraries ---------------------------------------------------------------------------


class _Caps(ctypes.Structure):
    """`CUVIDDECODECAPS` of cuviddec.h."""

    _fields_ = [
        ("eCodecType", ctypes.c_int),
        ("eChromaFormat", ctypes.c_int),
        ("nBitDepthMinus8", ctypes.c_uint),
        ("reserved1", ctypes.c_uint * 3),
        ("bIsSupported", ctypes.c_ubyte),
        ("nNumNVDECs", ctypes.c_ubyte),
        ("nOutputFormatMask", ctypes.c_ushort),
        ("nMaxWidth", ctypes.c_uint),
        ("nMaxHeight", ctypes.c_uint),
        ("nMaxMBCount", ctypes.c_uint),
        ("nMinWidth", ctypes.c_ushort),
        ("nMinHeight", ctypes.c_ushort),
        ("bIsHistogramSupported", ctypes.c_ubyte),
        ("nCounterBitDepth", ctypes.c_ubyte),
        ("nMaxHistogramBins", ctypes.c_ushort),
        ("reserved3", ctypes.c_uint * 10),
    ]


def _why_not() -> str:
    """The first thing that is missing of NVIDIA's driver; empty if nothing is."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1 is not there)"
    code = driver.cuInit(0)
    if code:
        return f"the NVIDIA driver offers no GPU (cuInit: error {code})"
    return ""


def _query() -> tuple[str, tuple[Ability, ...]]:
    """Name of the first visible GPU, and what its video engines decode.

    Raises:
        NoGpuError: The libraries do not tell.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        cuvid = ctypes.CDLL("libnvcuvid.so.1")
    except OSError as error:
        raise NoGpuError(
            f"{error}; a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        ) from None

    def call(library: ctypes.CDLL, function: str, *arguments: object) -> None:
        code = getattr(library, function)(*arguments)
        if code:
            raise NoGpuError(f"{function}: error {code}")

    device, context, name = ctypes.c_int(), ctypes.c_void_p(), ctypes.create_string_buffer(256)
    call(driver, "cuInit", 0)
    call(driver, "cuDeviceGet", ctypes.byref(device), 0)
    call(driver, "cuDeviceGetName", name, len(name), device)
    call(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    found: list[Ability] = []
    try:
        call(driver, "cuCtxPushCurrent_v2", context)
        for codec, number in _CODECS.items():
            for chroma, format_number in _CHROMAS.items():
                for bits in _BITS:
                    caps = _Caps(number, format_number, bits - 8)
                    # A driver that does not know the codec answers with an error.
                    if cuvid.cuvidGetDecoderCaps(ctypes.byref(caps)) or not caps.bIsSupported:
                        continue
                    largest = (caps.nMaxWidth, caps.nMaxHeight, 256 * caps.nMaxMBCount)
                    found.append(Ability(codec, chroma, bits, *largest, caps.nNumNVDECs))
        call(driver, "cuCtxPopCurrent_v2", ctypes.byref(context))
    finally:
        driver.cuDevicePrimaryCtxRelease(device)
    if not found:
        raise NoGpuError("the GPU has no video engine for H.264, HEVC, VP9 or AV1")
    return name.value.decode(errors="replace"), tuple(found)


def main() -> None:
    """Print what the first visible GPU can decode, or why none can, as one line of JSON."""
    try:
        found = gpu()
    except NoGpuError as error:
        print(json.dumps({"problem": str(error)}))
        sys.exit(1)
    print(json.dumps({"name": found.name, "abilities": [asdict(a) for a in found.abilities]}))


if __name__ == "__main__":
    main()
