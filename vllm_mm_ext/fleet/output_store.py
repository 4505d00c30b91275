"""Encoder outputs in a directory that several servers share.

A file is named by a hash of what it holds, so nothing that a client says becomes a path. A file
appears whole or not at all, and is never changed. Any file may vanish at any moment, as each server
that writes also evicts. So a reader *holds* a file first: a second name (a hard link) that no other
server removes.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Final, NamedTuple
from uuid import uuid4

from blake3 import blake3
from safetensors import SafetensorError

from vllm_mm_ext.fleet.tensor_files import entries, is_older, is_whole, lacks_room

logger = logging.getLogger("vllm.mm_ext")

SUFFIX: Final = ".safetensors"
_PARTS, _HELD = "parts", "held"
# After this many seconds what a writer or reader left behind is that of one that has died.
_ABANDONED_S = 900.0
# Seconds for which a file stays held after it was last found. What is to be read is pinned.
HOLD_S: Final = 60.0
# Seconds for which a file that was not found is not looked for again: schedulers ask in each step,
# about all that requests lack. What a request waits for is looked for more often.
_ABSENT_S, _AWAITED_S = 1.0, 0.01
# Shares of the capacity: the store is looked through after a writer has added so much, and files
# are evicted down to so much.
_GROWTH, _EVICT_TO = 0.05, 0.9
# Where the disk has no room, seconds between two evictions for it, or between two tries to write.
# If an eviction does not help, others fill the disk: none follows until a write has succeeded.
_FULL_S: Final = 60.0
# Of more held files those go that were found longest ago. Of no more files it is known that they
# were seen, or were absent.
_MOST_HELD = 4096


class _File(NamedTuple):
    used: float
    size: int
    path: Path


class OutputStore:
    """One server's access to the shared directory.

    Args:
        root: The directory; made if it is not there.
        capacity: Bytes of all files together. With several writers a twentieth more for each.
        reader: Names this reader among all readers and times; only a reader may ``hold``.
        clock: Seconds; a clock that nobody sets, as what is held must not all be let go at once.
    """

    def __init__(
        self,
        root: Path,
        capacity: int,
        reader: str | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._capacity = capacity
        self._clock = clock
        self._parts = root / _PARTS
        self._parts.mkdir(parents=True, exist_ok=True)
        self._own: Path | None = None
        if reader is not None:
            self._own = root / _HELD / _name(reader)
            self._own.mkdir(parents=True, exist_ok=True)
        # When each held file was last found, the oldest first; when each absent one was looked for.
        self._held: OrderedDict[str, float] = OrderedDict()
        # How often each pinned file is pinned; these are not among those held.
        self._pinned: dict[str, int] = {}
        self._absent: OrderedDict[str, float] = OrderedDict()
        # When each file that is not held was seen.
        self._seen: OrderedDict[str, float] = OrderedDict()
        self._told_of_failure = False
        self._written = 0
        # When files were last evicted for a full disk, and until when nothing is written for one.
        self._made_room = self._no_room_until = -math.inf
        self._room_helped = True  # A write has succeeded since.
        # Held while the store is looked through.
        self._sweeping = Lock()
        self._shown = clock()
        self.evicted = 0
        self.sweep()

    # --- for writers ------------------------------------------------------------------------------

    def path(self, key: str) -> Path:
        """Where the output of a key is, or would be."""
        name = _name(key)
        return self._root / name[:2] / (name + SUFFIX)

    def has(self, key: str) -> bool:
        """Whether the output of a key is there; makes it the one used last."""
        with suppress(OSError):
            os.utime(self.path(key))
            return True
        return False

    def put(self, key: str, write: Callable[[Path], None]) -> bool:
        """Store an output, whole or not at all.

        Args:
            key: Names the output.
            write: Writes it to a path that it is given, with safetensors.

        Returns:
            False if it is there already, or does not fit the capacity, or the disk is full.

        Raises:
            OSError: The directory cannot be written to.
        """
        if self.has(key) or self._clock() < self._no_room_until:
            return False
        part, path = self._parts / uuid4().hex, self.path(key)
        try:
            # Somebody may have cleaned it all. Files of safetensors are for their owner alone.
            self._parts.mkdir(parents=True, exist_ok=True)
            part.touch()
            mode = part.stat().st_mode
            write(part)
            part.chmod(mode)
            size = part.stat().st_size
            if size > self._capacity:
                return False
            path.parent.mkdir(exist_ok=True)
            os.replace(part, path)
            self._room_helped = True
        except (OSError, SafetensorError) as error:
            if lacks_room(error):
                self._make_room()
            raise OSError(f"{part} cannot be written: {error}") from error
        finally:
            part.unlink(missing_ok=True)
        self._absent.pop(key, None)
        self._written += size
        if self._written > _GROWTH * self._capacity and self._sweep_apart(full=False):
            self._written = 0
        return True

    def _make_room(self) -> None:
        """Evict for a disk that others fill too, or that is smaller than the capacity."""
        now = self._clock()
        if self._room_helped and now - self._made_room >= _FULL_S:
            if self._sweep_apart(full=True):
                self._made_room, self._room_helped = now, False
        elif not self._sweeping.locked():
            self._no_room_until = now + _FULL_S

    def _sweep_apart(self, *, full: bool) -> bool:
        """Whether a thread begins to look through the store now; else a later write has one.

        Apart: a model's forward pass waits for ``put``, and a network file system takes seconds to
        tell of all files.
        """
        if self._sweeping.locked():
            return False
        sweep = partial(self.sweep, full=full)
        try:
            Thread(target=sweep, name="output-sweep", daemon=True).start()
        except RuntimeError:
            return False
        return True

    # --- for readers ------------------------------------------------------------------------------

    def hold(self, key: str, *, awaited: bool = False) -> bool:
        """Whether the output of a key can be read; if so, it stays readable for ``HOLD_S``.

        Args:
            key: Names the output.
            awaited: Somebody waits for it, so it is looked for again after a shorter time.
        """
        own, now = self._own_directory(), self._clock()
        if key in self._pinned and os.path.exists(self.held_path(key)):
            # Others may take a server that was paused for dead, and remove what it holds.
            return True
        if now - self._held.get(key, -HOLD_S) < HOLD_S:
            self._held[key] = now
            self._held.move_to_end(key)
            return True
        if now - self._absent.get(key, -_ABSENT_S) < (_AWAITED_S if awaited else _ABSENT_S):
            return False
        self._held.pop(key, None)
        self._seen.pop(key, None)
        path, link = self.path(key), own / (_name(key) + SUFFIX)
        try:
            self._link(path, link)
            if not is_whole(link):
                # A machine lost power before all of it was on the disk.
                link.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                raise FileNotFoundError
            os.utime(link)
        except OSError as error:
            # Nobody would remove a link that is left, as it is not among those held.
            with suppress(OSError):
                link.unlink(missing_ok=True)
            if not isinstance(error, FileNotFoundError) and not self._told_of_failure:
                self._told_of_failure = True
                logger.warning("mm_ext: the store of encoder outputs cannot be read: %s", error)
            _note(self._absent, key, now)
            return False
        if key not in self._pinned:
            self._held[key] = now
        self._told_of_failure = False
        return True

    def seems_there(self, key: str) -> bool:
        """Whether the output of a key can probably be held: it was there in the last ``HOLD_S``.

        A first look takes much less time than ``hold``, which a scheduler cannot wait for with each
        of a thousand items.
        """
        now = self._clock()
        pinned = key in self._pinned and os.path.exists(self.held_path(key))
        if pinned or any(
            now - known.get(key, -HOLD_S) < HOLD_S for known in (self._held, self._seen)
        ):
            return True
        if now - self._absent.get(key, -_ABSENT_S) < _ABSENT_S:
            return False
        found = os.path.exists(self.path(key))
        _note(self._seen if found else self._absent, key, now)
        return found

    def _link(self, path: Path, link: Path) -> None:
        try:
            with suppress(FileExistsError):
                os.link(path, link)
        except FileNotFoundError:
            if not path.exists():
                raise
            # Another server has taken this one for dead.
            link.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                os.link(path, link)

    def pin(self, key: str) -> bool:
        """Whether the output of a key can be read; if so, it stays readable until ``unpin``."""
        if not self.hold(key, awaited=True):
            return False
        self._held.pop(key, None)
        self._pinned[key] = self._pinned.get(key, 0) + 1
        return True

    def unpin(self, key: str) -> None:
        """Take a pin of a key back; with the last one the file is held as if it was just found."""
        pins = self._pinned.pop(key, 0)
        if pins > 1:
            self._pinned[key] = pins - 1
        elif pins and os.path.exists(self.held_path(key)):
            self._held[key] = self._clock()

    def look_again(self) -> None:
        """Forget which outputs were not there a moment ago."""
        self._absent.clear()

    def held_path(self, key: str) -> Path:
        """The file of a key that ``hold`` has found."""
        return self._own_directory() / (_name(key) + SUFFIX)

    def release(self) -> None:
        """Let go of the files that nobody has looked for in ``HOLD_S``; show that it lives."""
        now = self._clock()
        if now - self._shown >= HOLD_S:
            self._shown = now
            with suppress(OSError):
                os.utime(self._own_directory())
        while self._held:
            key, found = next(iter(self._held.items()))
            if now - found < HOLD_S and len(self._held) <= _MOST_HELD:
                return
            del self._held[key]
            self._remove_link(key)

    def forget(self, key: str) -> None:
        """Remove the output of a key from the store, and from what this and idle readers hold.

        A reader at work may be about to read it, and lets go within ``HOLD_S`` of its last use.
        """
        self.path(key).unlink(missing_ok=True)
        # Pins stay counted: each is yet taken back by who has it.
        for known in (self._held, self._seen):
            known.pop(key, None)
        # One at work shows it every ``HOLD_S``.
        idle = time.time() - 2 * HOLD_S
        for reader in entries(self._root / _HELD):
            own = self._own is not None and reader.name == self._own.name
            if own or is_older(reader, idle):
                with suppress(OSError):
                    os.unlink(Path(reader.path) / (_name(key) + SUFFIX))

    def empty(self) -> None:
        """Remove all files, and let go of what is held and not pinned; no read may be under way."""
        self.let_go()
        for file in self._files():
            with suppress(OSError):
                file.path.unlink()

    def let_go(self) -> None:
        """Let go of everything that is held and not pinned; no read may be under way."""
        for key in self._held:
            self._remove_link(key)
        self._held.clear()
        self._seen.clear()

    def close(self) -> None:
        """Let go of everything, and of the place for it."""
        self._held.clear()
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)

    # --- for all ----------------------------------------------------------------------------------

    def sweep(self, *, full: bool = False) -> None:
        """Evict what was used least recently, down to the capacity, and clean up after the dead.

        Args:
            full: The disk has no room, so files go though the store is within its capacity.
        """
        with self._sweeping:
            self._look_through(full)

    def _look_through(self, full: bool) -> None:
        before = time.time() - _ABANDONED_S
        for part in entries(self._parts):
            if is_older(part, before):
                with suppress(OSError):
                    os.unlink(part.path)
        for directory in entries(self._root / _HELD):
            if self._own is not None and directory.name == self._own.name:
                continue
            if is_older(directory, before):
                shutil.rmtree(directory, ignore_errors=True)
        files = sorted(self._files())
        held = sum(file.size for file in files)
        if held <= self._capacity and not full:
            return
        most = _EVICT_TO * min(held, self._capacity)
        for file in files:
            if held <= most:
                break
            # Another server may have evicted the same file.
            with suppress(OSError):
                file.path.unlink()
                self.evicted += 1
            held -= file.size

    def figures(self) -> tuple[int, int]:
        """Number of files in the store now, and their bytes."""
        files = list(self._files())
        return len(files), sum(file.size for file in files)

    def _files(self) -> Iterator[_File]:
        for directory in entries(self._root):
            if len(directory.name) != 2:
                continue
            for entry in entries(directory):
                with suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    yield _File(found.st_mtime, found.st_size, Path(entry.path))

    def _remove_link(self, key: str) -> None:
        # A link that stays for an error goes with the server's place in the store.
        with suppress(OSError):
            os.unlink(self.held_path(key))

    def _own_directory(self) -> Path:
        if self._own is None:
            raise ValueError("this access to the store is a writer's")
        return self._own


def _note(times: OrderedDict[str, float], key: str, now: float) -> None:
    times[key] = now
    times.move_to_end(key)
    if len(times) > _MOST_HELD:
        times.popitem(last=False)


def _name(key: str) -> str:
    return blake3(key.encode("utf-8", "surrogatepass")).hexdigest(32)
