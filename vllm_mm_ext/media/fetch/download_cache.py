"""Downloads kept on disk, as vLLM keeps them where ``VLLM_MEDIA_CACHE`` names a directory.

Names, ages and sizes follow vLLM's own media connector, so that stock code (which loads images)
and the plugin can share a directory. As there, what the origin says about caching does not count:
the operator asked for the directory.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blake3 import blake3
from cachetools import LRUCache

from vllm_mm_ext.errors import FULL_DISK, BusyError
from vllm_mm_ext.media.bounded_threads import BoundedThreads
from vllm_mm_ext.media.fetch.blob import Blob, check_size
from vllm_mm_ext.media.fetch.byte_gate import Claim
from vllm_mm_ext.media.fetch.file_source import FileIdentity, Reading, read_blob
from vllm_mm_ext.media.fetch.source import Fetched, Source, tighter

logger = logging.getLogger("vllm.mm_ext")

_READ_CHUNK = 1 << 20
# The time of a file's last use may be this many seconds too early, or a tenth of the time to live.
# A touch makes every process that shares the directory read the file again.
_TOUCH_AFTER_S = 60.0
# Where the disk is full below the bound, downloads are evicted down to this share of what is there,
# no more often than once in so many seconds.
_KEEP_OF_FULL, _FULL_S = 0.9, 60.0


@dataclass(frozen=True)
class DownloadCacheSettings:
    """Where and how long downloads are kept.

    Attributes:
        directory: Created if it does not exist.
        max_bytes: Bytes of all files together. The least recently used go first.
        ttl_s: Seconds since the last use after which a file is not used again.
    """

    directory: Path
    max_bytes: int
    ttl_s: float


class CachedDownloads:
    """A source of HTTP URLs that looks on disk before it asks the origin.

    Args:
        origin: Downloads what is not on disk.
        settings: See there.
        threads: For reading and writing, as the disk may be that of a server that is gone.
        max_bytes: Limit on the size of one download, None for none.
        max_known: Files whose digest is remembered.

    Attributes:
        counts: Downloads found on disk, and downloads written there.
    """

    def __init__(
        self,
        origin: Source[str],
        settings: DownloadCacheSettings,
        *,
        threads: BoundedThreads,
        max_bytes: int | None,
        max_known: int = 4096,
    ) -> None:
        self._origin = origin
        self._threads = threads
        self._settings = settings
        self._max_bytes = max_bytes
        self._known: LRUCache[FileIdentity, str] = LRUCache(max_known)
        self._lock = threading.Lock()
        self._made_room = -math.inf
        self._usable = _is_writable(settings.directory)
        self.counts = {"disk_hits": 0, "disk_writes": 0}

    async def locate(self, url: str, claim: Claim) -> str:
        """See ``Source.locate``: access is checked whether or not the download is on disk."""
        return await self._origin.locate(url, claim)

    async def fetch(
        self, location: str, *, timeout_s: float, max_bytes: int | None, load: bool, claim: Claim
    ) -> Fetched:
        """See ``Source.fetch``."""
        if self._usable:
            limit = tighter(self._max_bytes, max_bytes)
            look_up = partial(self._look_up, location, limit, load)
            found = await self._threads.run(look_up, claim.max_wait_s)
            if isinstance(found, FileIdentity):
                found = await self._load(location, found, claim)
            if found is not None:
                return found
        fetched = await self._origin.fetch(
            location, timeout_s=timeout_s, max_bytes=max_bytes, load=load, claim=claim
        )
        if self._usable and fetched.blob is not None:
            keep = partial(self._keep, location, fetched.blob)
            # The request has what it wants.
            with suppress(BusyError):
                await self._threads.run(keep, claim.max_wait_s)
        return fetched

    def forget(self, digests: Collection[str], urls: Collection[str]) -> None:
        """Remove downloads from the disk.

        All files are read, as their names do not tell their content.

        Args:
            digests: Of the downloads.
            urls: URLs whose download goes, whatever it is.
        """
        with self._lock:
            for identity in [one for one, digest in self._known.items() if digest in digests]:
                del self._known[identity]
        unwanted = {self._path_of(url).name for url in urls}
        with suppress(FileNotFoundError), os.scandir(self._settings.directory) as entries:
            for entry in entries:
                # A file may go meanwhile.
                with suppress(OSError):
                    if entry.is_file(follow_symlinks=False) and (
                        entry.name in unwanted or _digest_of(entry.path) in digests
                    ):
                        os.remove(entry.path)

    def _look_up(self, url: str, limit: int | None, load: bool) -> Fetched | FileIdentity | None:
        """What is known of a download on disk, else its file; None if it is not on disk."""
        path = self._path_of(url)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            before = FileIdentity.of(os.fstat(fd))
            unused_s = time.time() - before.mtime_ns / 1e9
            if unused_s > self._settings.ttl_s:
                path.unlink(missing_ok=True)
                return None
            if unused_s > min(_TOUCH_AFTER_S, self._settings.ttl_s / 10):
                os.utime(fd)  # The time of the last use, by which files are evicted.
            check_size(before.size, limit, "The remote media")
            # Files are replaced, never rewritten, and who touches one changes its identity.
            found = FileIdentity.of(os.fstat(fd))
            with self._lock:
                digest = self._known.pop(before, None)
                if digest is None or load:
                    return found
                self.counts["disk_hits"] += 1
                self._known[found] = digest
            return Fetched(digest, found.size, None)
        except OSError:
            return None
        finally:
            os.close(fd)

    async def _load(self, url: str, found: FileIdentity, claim: Claim) -> Fetched | None:
        """The bytes of a download on disk; None if they are gone meanwhile."""
        # The file is not open meanwhile: descriptors are scarcer than requests.
        lease = await claim.acquire(found.size)
        reading = Reading(self._threads)
        try:
            read = partial(self._read, url, found, reading.go_on)
            blob = await self._threads.run(read, claim.max_wait_s)
            if blob is None:
                lease.release()
                return None
            blob.hold(lease)
            return Fetched.of(blob)
        except BaseException:
            lease.release()
            raise
        finally:
            reading.stop()  # If this task was cancelled, the thread ends at its next chunk.

    def _read(self, url: str, found: FileIdentity, go_on: Callable[[], None]) -> Blob | None:
        try:
            fd = os.open(self._path_of(url), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            # Not its times: others who use the file at the same time touch it too.
            if FileIdentity.of(os.fstat(fd))[:3] != found[:3]:
                return None
            blob = read_blob(fd, found.size, go_on)
            with self._lock:
                self.counts["disk_hits"] += 1
                self._known[FileIdentity.of(os.fstat(fd))] = blob.digest
            return blob
        except OSError:
            return None
        finally:
            os.close(fd)

    def _keep(self, url: str, blob: Blob) -> None:
        path = self._path_of(url)
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=self._settings.directory, delete=False) as file:
                temporary = file.name
                for chunk in blob.chunks():
                    file.write(chunk)
            os.rename(temporary, path)
        except OSError as error:
            if temporary is not None:
                with suppress(OSError):
                    os.remove(temporary)
            if error.errno in FULL_DISK:
                self._make_room()
            return
        with self._lock:
            self.counts["disk_writes"] += 1
        with suppress(OSError):
            self._evict(keep=path.name)

    def _make_room(self) -> None:
        """Evict for a disk that others fill too, or that is smaller than the bound."""
        now = time.monotonic()
        with self._lock:
            if now - self._made_room < _FULL_S:
                return
            self._made_room = now
        with suppress(OSError):
            self._evict(share=_KEEP_OF_FULL)

    def _evict(self, keep: str = "", share: float = 1.0) -> None:
        """Remove what is too old, then what was least recently used.

        Args:
            keep: A file that stays.
            share: Of the bytes that are there, the part that may stay, if the bound allows it.
        """
        now, total = time.time(), 0
        kept: list[tuple[float, int, str]] = []
        expired: list[str] = []
        with os.scandir(self._settings.directory) as entries:
            for entry in entries:
                try:
                    status = entry.stat()
                except OSError:
                    continue
                if entry.name.startswith(".") or not stat.S_ISREG(status.st_mode):
                    continue
                if now - status.st_mtime > self._settings.ttl_s:
                    expired.append(entry.path)
                    continue
                total += status.st_size
                if entry.name != keep:
                    kept.append((status.st_mtime, status.st_size, entry.path))
        most = min(self._settings.max_bytes, share * total)
        for _, size, name in sorted(kept):
            if total <= most:
                break
            expired.append(name)
            total -= size
        for name in expired:
            with suppress(OSError):
                os.remove(name)

    def _path_of(self, url: str) -> Path:
        name = hashlib.sha256(url.encode()).hexdigest()[:20]
        return self._settings.directory / (name + Path(url.split("?", 1)[0]).suffix)


def _digest_of(path: str) -> str:
    hasher = blake3()
    with open(path, "rb") as file:
        while chunk := file.read(_READ_CHUNK):
            hasher.update(chunk)
    return str(hasher.hexdigest())


def _is_writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory):
            pass
    except OSError:
        logger.warning("%s is not writable: downloads are not kept on disk.", directory)
        return False
    return True
