"""The files that a decode worker keeps open between jobs about spans of them."""

from __future__ import annotations

import os
import time
from collections import OrderedDict

from vllm_mm_ext.media.audio.sound_reader import SoundReader
from vllm_mm_ext.media.decode.decoders.base import check_file
from vllm_mm_ext.media.decode.decoders.kept_reader import KeptReader
from vllm_mm_ext.media.types import DecodeRequest, MediaInfo

# Files that a worker keeps open.
MOST_FILES = 2
# Seconds without a job about it after which a worker lets go of a file: media are memory.
KEEP_S = 60.0
# The share of a worker's memory that the pictures kept of one file may take. With the default limit
# on memory that is 180 pictures of 720p, or 80 of 1080p.
_KEPT_SHARE = 16


def file_key(request: DecodeRequest) -> str:
    """What two jobs have in common that can use one open file; empty for a job that opens its own.

    Args:
        request: The job.
    """
    sampling = request.sampling
    if not request.content or request.probe_only or sampling is None or sampling.span is None:
        return ""
    stream, pixels = sampling.video_stream, request.limits.max_pixels
    return f"{request.content}|{stream}|{pixels}|{request.picture}"


class OpenFile:
    """One file, with what is known of it and its readers.

    Args:
        fd: Descriptor of the file; the object has a duplicate of its own.

    Attributes:
        path: The file, as long as it is open.
        info: Its probe, with the packet table; None until it was probed.
        used: ``time.monotonic()`` value at which the last job about it ended.
    """

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)
        self.path = f"/proc/self/fd/{self._fd}"
        self.info: MediaInfo | None = None
        self.used = time.monotonic()
        self._video: KeptReader | None = None
        self._sound: tuple[int, SoundReader] | None = None

    def video(self, info: MediaInfo, request: DecodeRequest) -> KeptReader | None:
        """What reads the pictures of the job's span; None where there are none.

        Args:
            info: Of the whole file.
            request: The job.

        Raises:
            MediaError: As ``check_file``.
        """
        sampling, limits = request.sampling, request.limits
        if info.video is None or info.packets is None:
            return None
        assert sampling is not None
        assert sampling.span is not None
        if self._video is None:
            check_file(self.path, info, limits.max_pixels)
            threads = request.threads or os.cpu_count() or 1
            self._video = KeptReader(
                self.path, info.video.index, info.packets, limits.max_pixels, threads
            )
        self._video.begin(sampling.span, limits.memory_bytes // _KEPT_SHARE)
        return self._video

    def sound(self, number: int, max_pixels: int) -> SoundReader:
        """What reads one of the audio streams.

        Args:
            number: Number of the stream among the file's audio streams.
            max_pixels: See ``open_container``.

        Raises:
            MediaError: As ``SoundReader``.
        """
        if self._sound is None or self._sound[0] != number:
            self.close_sound()
            self._sound = number, SoundReader(self.path, number, max_pixels)
        return self._sound[1]

    def close_sound(self) -> None:
        """Close what reads the sound."""
        sound, self._sound = self._sound, None
        if sound is not None:
            sound[1].close()

    def close_readers(self) -> None:
        """Close all but the file itself; later jobs open the readers again."""
        self.close_sound()
        if self._video is not None:
            self._video.close()

    def close(self) -> None:
        """Close everything."""
        self.close_readers()
        os.close(self._fd)


class OpenFiles:
    """The open files of a worker: those used last, at most ``MOST_FILES``."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, OpenFile] = OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def of(self, request: DecodeRequest, fd: int) -> OpenFile | None:
        """The file of a job, opened if it is not; None for a job that keeps nothing.

        Args:
            request: The job.
            fd: Descriptor of the job's file.
        """
        key = file_key(request)
        if not key:
            return None
        if key not in self._files:
            while len(self._files) >= MOST_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[key] = OpenFile(fd)
        self._files.move_to_end(key)
        return self._files[key]

    def drop(self, request: DecodeRequest) -> None:
        """Close the file of a job."""
        file = self._files.pop(file_key(request), None)
        if file is not None:
            file.close()

    def close_unused(self, request: DecodeRequest, now: float) -> None:
        """Close the files that no job was about for ``KEEP_S``.

        Args:
            request: A job that has ended now.
            now: ``time.monotonic()``.
        """
        used = self._files.get(file_key(request))
        if used is not None:
            used.used = now
        for key in [key for key, file in self._files.items() if now - file.used >= KEEP_S]:
            self._files.pop(key).close()

    def close(self) -> None:
        """Close all files."""
        while self._files:
            self._files.popitem()[1].close()
