"""Messages between a decode pool and its worker processes.

A message is a typed value in MessagePack, with file descriptors beside it: encoded media travels to
a worker, and frames and sound travel back, as descriptors of shared memory. A worker reads files
that a stranger made, so the pool believes nothing a worker says: ``decode_reply`` takes known
messages with known types and sound values only, and ``check_result`` holds a result against the
request. Nothing that a worker sends is ever run or unpickled.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np

from vllm_mm_ext.errors import (
    MediaError,
    MediaTooLargeError,
    MediaTooLongError,
    NoSuchStreamError,
    UnreadableMediaError,
    UnsupportedFormatError,
    no_room,
)
from vllm_mm_ext.media.decode.packets import MAX_PACKETS
from vllm_mm_ext.media.decode.wire_checks import (
    MalformedMessageError,
    check_frames,
    check_info,
    check_sound,
    check_timings,
    require,
)
from vllm_mm_ext.media.types import AudioNote, DecodeRequest, FrameSelection, MediaInfo

M = TypeVar("M")

MAX_BYTES = MAX_PACKETS * 29 + (1 << 20)
"""Bytes of the largest message: the packet table of a probe (29 bytes a row), and the rest."""
MAX_RESULT_BYTES = 1 << 20
"""Bytes of the largest message about a decode: each of a few thousand frames takes 16."""

_HEADER = struct.Struct("<I")
_MAX_FDS = 2
# What can have decoded frames; nothing has where there are none.
_DECODERS = frozenset({"", "pyav", "decord", "nvdec"})
# Characters of an error message.
_MAX_TEXT = 4096


class _Message(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Base of all messages; the class name tells them apart."""


class Job(_Message):
    """Pool to worker, with the descriptor of the encoded media: do this."""

    request: DecodeRequest


class Reserve(_Message):
    """Worker to pool: the job is about to make this many bytes of frames and sound.

    The pool does not answer: it has acquired as many already, as far as they could be told before.
    """

    num_bytes: int


class Probed(_Message):
    """Worker to pool: the answer to a job with ``probe_only``.

    Attributes:
        info: What the container says.
        timings: Stage name to seconds.
    """

    info: MediaInfo
    timings: dict[str, float]


class Decoded(_Message):
    """Worker to pool: the answer to any other job.

    The descriptor of the frames travels beside the message, then the one of the sound, for those of
    the two that there are.

    Attributes:
        info: What the container says, without its packet table.
        selection: The frames decoded, without an activity profile.
        frames: Shape of the frames (uint8), ``(n, height, width, 3)``.
        samples: Samples of the sound (float32, mono).
        audio_rate: Sampling rate of the sound in Hz, 0 without sound.
        decoder: Backend that decoded.
        timings: Stage name to seconds.
        audio_note: What became of optional sound that is not there as a whole.
        decoder_note: Why a GPU that was to decode did not.
    """

    info: MediaInfo
    selection: FrameSelection | None
    frames: tuple[int, int, int, int] | None
    samples: int | None
    audio_rate: int
    decoder: str
    timings: dict[str, float]
    audio_note: AudioNote = ""
    decoder_note: str = ""


class Failed(_Message):
    """Worker to pool: the media cannot be served. ``error`` makes the exception of it.

    Attributes:
        code, message, parameter, value: Those of the ``MediaError``.
        out_of_memory: Its cause is a ``MemoryError``.
    """

    code: str
    message: str
    parameter: str
    value: int | float | str | None
    out_of_memory: bool = False

    @classmethod
    def of(cls, error: MediaError) -> Failed:
        """The message that carries ``error``."""
        code = error.code if error.code in _ERRORS else MediaError.code
        value = error.value
        if not isinstance(value, int | float | str | None):
            value = None
        short = isinstance(error.__cause__, MemoryError)
        return cls(code, error.message[:_MAX_TEXT], error.parameter, value, short)

    def error(self) -> MediaError:
        """The error that the worker met, as one of the classes a worker may name."""
        error = _ERRORS[self.code](self.message, parameter=self.parameter, value=self.value)
        error.__cause__ = MemoryError() if self.out_of_memory else None
        return error


class Broken(_Message):
    """Worker to pool: the decoder failed through a fault of its own, described in ``text``."""

    text: str


# What is wrong with a file; a worker cannot claim any other error.
_ERRORS: dict[str, type[MediaError]] = {
    kind.code: kind
    for kind in (
        MediaError,
        MediaTooLargeError,
        MediaTooLongError,
        NoSuchStreamError,
        UnreadableMediaError,
        UnsupportedFormatError,
    )
}

Reply = Reserve | Probed | Decoded | Failed | Broken


# --- bytes ----------------------------------------------------------------------------------------


def _plain(value: object) -> Any:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, np.generic):
        return value.item()
    raise NotImplementedError(f"{type(value)} does not travel")


def _typed(kind: Any, value: object) -> Any:
    """An array of the element type that a field declares (``NDArray[np.int64]``...)."""
    dtype = np.dtype(typing.get_args(typing.get_args(kind)[1])[0])
    if not isinstance(value, bytes):
        raise TypeError("an array travels as bytes")
    if dtype == np.bool_:
        # Any byte but 0 is true; NumPy expects 0 and 1 alone.
        return np.frombuffer(value, np.uint8) != 0
    return np.frombuffer(value, dtype)


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply, dec_hook=_typed)
_jobs: msgspec.msgpack.Decoder[Job] = msgspec.msgpack.Decoder(Job, dec_hook=_typed)


def encode(message: Reply | Job) -> bytes:
    """The bytes of a message."""
    return _encoder.encode(message)


def packed(value: object) -> bytes:
    """The bytes of a value of typed fields, arrays among them."""
    return _encoder.encode(value)


def unpacked(payload: bytes, kind: type[M]) -> M:
    """A value from the bytes that ``packed`` made of one of its kind.

    Raises:
        msgspec.MsgspecError: They are no such value.
    """
    return msgspec.msgpack.decode(payload, type=kind, dec_hook=_typed)


def decode_job(payload: bytes | bytearray) -> Job:
    """What the pool wants of its worker."""
    return _jobs.decode(payload)


def decode_reply(payload: bytes | bytearray) -> Reply:
    """What a worker said, checked as far as the message alone can tell.

    Raises:
        MalformedMessageError: It is no message of a worker, or a value in it cannot be true.
    """
    try:
        message = _replies.decode(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise MalformedMessageError(f"not a message of a worker: {error}") from error
    match message:
        case Probed() | Decoded():
            check_info(message.info)
            check_timings(message.timings)
        case Failed():
            require(message.code in _ERRORS, "kind of error")
            texts = (message.message, message.parameter, message.value)
            short = all(len(text) <= _MAX_TEXT for text in texts if isinstance(text, str))
            require(short, "length of an error")
    return message


def check_result(result: Probed | Decoded, request: DecodeRequest) -> None:
    """Hold a result against the request it answers, before memory is mapped for it.

    Raises:
        MalformedMessageError: It is no answer to the request, or past the request's limits.
    """
    require(isinstance(result, Probed) == request.probe_only, "kind of answer")
    if isinstance(result, Decoded):
        require(result.info.packets is None, "packet table of a decoded file")
        require(result.decoder in _DECODERS, "name of a decoder")
        require(len(result.decoder_note) <= _MAX_TEXT, "length of a note")
        check_frames(result.frames, result.selection, result.info, request)
        check_sound(result.samples, result.audio_rate, request)


def num_arrays(reply: Reply) -> int:
    """Descriptors that belong to a message: one for each array of a result."""
    if not isinstance(reply, Decoded):
        return 0
    return (reply.frames is not None) + (reply.samples is not None)


# --- the socket -----------------------------------------------------------------------------------


def send(
    sock: socket.socket,
    message: Reply | Job,
    fds: Sequence[int] = (),
    deadline: float | None = None,
) -> None:
    """Send a message.

    Args:
        sock: Stream socket.
        message: The message.
        fds: The receiver gets duplicates of these descriptors (at most 2).
        deadline: ``time.monotonic()`` value to give up at.

    Raises:
        OSError: The other side is gone.
        TimeoutError: The deadline passed.
    """
    payload = encode(message)
    _arm(sock, deadline)
    socket.send_fds(sock, [_HEADER.pack(len(payload))], list(fds))
    sock.sendall(payload)


def receive(
    sock: socket.socket,
    decode: Callable[[bytearray], M],
    deadline: float | None = None,
    max_bytes: int = MAX_BYTES,
) -> tuple[M, list[int]]:
    """Wait for the next message.

    Args:
        sock: Stream socket.
        decode: ``decode_reply`` or ``decode_job``.
        deadline: ``time.monotonic()`` value to give up at.
        max_bytes: A longer message is not read.

    Returns:
        The message, and the descriptors that came with it, which the caller must close.

    Raises:
        EOFError, OSError: The other side is gone.
        TimeoutError: The deadline passed.
        MalformedMessageError: The message is too long, or ``decode`` refuses it.
        BusyError: This process is short of descriptors; the message has been read.
    """
    _arm(sock, deadline)
    header, fds, flags, _ = socket.recv_fds(sock, _HEADER.size, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    try:
        header += _read(sock, _HEADER.size - len(header), deadline)
        (length,) = _HEADER.unpack(header)
        if length > max_bytes:
            raise MalformedMessageError(f"a message of {length} bytes, more than {max_bytes}")
        message = _read(sock, length, deadline)
        # More descriptors than belong to a message are cut off too, but then the most are there.
        if flags & socket.MSG_CTRUNC and len(fds) < _MAX_FDS:
            raise no_room(os.strerror(errno.EMFILE))
        return decode(message), fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _read(sock: socket.socket, count: int, deadline: float | None) -> bytearray:
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        _arm(sock, deadline)
        received = sock.recv_into(view[got:])
        if not received:
            raise EOFError
        got += received
    return data


def _arm(sock: socket.socket, deadline: float | None) -> None:
    if deadline is None:
        sock.settimeout(None)
        return
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)
