"""The shared store of encoder outputs: names, bounds, and files that come and go."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import save_file

from vllm_mm_ext.fleet import output_store
from vllm_mm_ext.fleet.output_store import HOLD_S, OutputStore
from vllm_mm_ext.fleet.tensor_files import is_whole

CAPACITY = 4000


class Clock:
    """Time of the test; files have the times of the file system."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def content(size: int) -> bytes:
    """A safetensors file with so many bytes of one tensor."""
    header = json.dumps({"t": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    return struct.pack("<Q", len(header)) + header.encode() + bytes(size)


def put(store: OutputStore, key: str, size: int = 100) -> bool:
    def write(path: Path) -> None:
        path.write_bytes(content(size))

    return store.put(key, write)


def names(root: Path) -> list[Path]:
    return [path.relative_to(root) for path in root.rglob("*") if path.is_file()]


@given(st.text(max_size=300))
@settings(max_examples=50)
def test_nothing_that_a_client_says_becomes_a_path(
    tmp_path_factory: pytest.TempPathFactory, key: str
) -> None:
    root = tmp_path_factory.mktemp("store")
    store = OutputStore(root, CAPACITY)
    assert put(store, key)
    (found,) = names(root)
    assert found.suffix == ".safetensors"
    assert len(found.parts) == 2
    assert set(found.stem) <= set("0123456789abcdef")
    assert store.has(key)


def test_what_is_looked_for_leaves_no_trace(tmp_path: Path) -> None:
    store = OutputStore(tmp_path, CAPACITY, "reader")
    before = sorted(tmp_path.rglob("*"))
    assert not store.has("absent")
    assert not store.hold("absent")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = OutputStore(tmp_path, CAPACITY)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.put("key", fail)
    assert not names(tmp_path)
    assert not store.has("key")


def test_a_store_that_was_cleaned_away_is_made_anew_or_says_what_is_wrong(tmp_path: Path) -> None:
    root = tmp_path / "store"
    store = OutputStore(root, CAPACITY)

    def write(path: Path) -> None:
        save_file({"t": np.zeros(9, np.uint8)}, path)

    def fail(path: Path) -> None:
        save_file({"t": np.zeros(9, np.uint8)}, path / "no directory")

    assert store.put("first", write)
    shutil.rmtree(root)
    with pytest.raises(OSError, match="cannot be written"):
        store.put("second", fail)
    assert store.put("second", write)
    assert OutputStore(root, CAPACITY, "reader").hold("second")
    shutil.rmtree(root)
    root.write_text("no directory")
    with pytest.raises(OSError, match="directory"):
        store.put("third", write)


def test_files_have_the_rights_that_the_process_gives_to_new_ones(tmp_path: Path) -> None:
    store = OutputStore(tmp_path, CAPACITY)
    (usual := tmp_path / "usual").touch()
    store.put("key", lambda path: save_file({"t": np.zeros(9, np.uint8)}, path))
    assert store.path("key").stat().st_mode == usual.stat().st_mode


def test_what_is_stored_is_not_written_again(tmp_path: Path) -> None:
    store = OutputStore(tmp_path, CAPACITY)
    assert put(store, "key")
    assert not put(store, "key")
    assert not put(store, "too large", CAPACITY + 1)


def test_what_was_used_least_recently_goes_first(tmp_path: Path) -> None:
    store = OutputStore(tmp_path, 2 * CAPACITY)
    for number in range(10):
        put(store, str(number), 500)
        os.utime(store.path(str(number)), (number, number))
    store.has("0")
    OutputStore(tmp_path, CAPACITY)
    kept = {str(number) for number in range(10) if store.path(str(number)).exists()}
    assert "0" in kept
    assert "1" not in kept
    assert kept - {"0"} == {str(number) for number in range(11 - len(kept), 10)}


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30), st.integers(1, 900)), max_size=60))
@settings(max_examples=40)
def test_two_writers_keep_the_bound_and_their_writers_share(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, int, int]]
) -> None:
    root = tmp_path_factory.mktemp("store")
    stores = [OutputStore(root, CAPACITY), OutputStore(root, CAPACITY)]
    for writer, key, size in writes:
        put(stores[writer], str(key), size)
        with stores[writer]._sweeping:
            pass
    # Each may have added a twentieth and one file since it looked.
    count, held = stores[0].figures()
    assert held <= CAPACITY + 2 * (CAPACITY // 20 + 1000)
    stores[1].sweep()
    count, held = stores[1].figures()
    assert held <= CAPACITY
    assert count == len([one for one in names(root) if one.suffix == ".safetensors"])


def test_who_writes_does_not_wait_while_the_store_is_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = OutputStore(tmp_path, CAPACITY)
    may_end, looked = Event(), []

    def look_through(_: bool) -> None:
        looked.append(may_end.wait())

    monkeypatch.setattr(store, "_look_through", look_through)
    assert all(put(store, str(number), 500) for number in range(4))
    may_end.set()
    with store._sweeping:
        # One at a time.
        assert looked == [True]
    monkeypatch.undo()
    assert put(store, "more", 2000)
    with store._sweeping:
        assert store.figures()[1] <= CAPACITY


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=str,
)
def test_a_disk_that_is_full_below_the_capacity_is_made_room_on(
    tmp_path: Path, error: Exception
) -> None:
    clock, tries = Clock(), []
    store = OutputStore(tmp_path, 100 * CAPACITY, clock=clock)
    for number in range(10):
        put(store, str(number), 500)
        os.utime(store.path(str(number)), (number, number))

    def fail(path: Path) -> None:
        tries.append(path)
        raise error

    def left() -> list[int]:
        while any(thread.name.startswith("output-sweep") for thread in threading.enumerate()):
            time.sleep(0.01)
        return [number for number in range(10) if store.path(str(number)).exists()]

    with pytest.raises(OSError, match=r"full|space|quota"):
        store.put("more", fail)
    assert left() == list(range(1, 10))
    assert put(store, "more")
    # Where that does not help, the disk is tried again, and files go, once a minute.
    with pytest.raises(OSError, match=r"full|space|quota"):
        store.put("yet more", fail)
    for _ in range(9):
        assert not store.put("yet more", fail)
    assert left() == list(range(1, 10))
    assert len(tries) == 2
    clock.now += 60.0
    with pytest.raises(OSError, match=r"full|space|quota"):
        store.put("yet more", fail)
    assert left() == list(range(2, 10))
    assert put(store, "yet more")


def test_a_disk_that_others_keep_full_takes_the_store_no_more_than_one_eviction(
    tmp_path: Path,
) -> None:
    clock, tries = Clock(), []
    store = OutputStore(tmp_path, 100 * CAPACITY, clock=clock)
    for number in range(20):
        put(store, str(number), 500)

    def fail(path: Path) -> None:
        tries.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    for _ in range(30 * 6):
        with suppress(OSError):
            store.put("more", fail)
        while any(thread.name.startswith("output-sweep") for thread in threading.enumerate()):
            time.sleep(0.01)
        clock.now += 10.0
    assert store.figures()[0] >= 0.8 * 20
    assert 25 < len(tries) < 35, "whether there is room again is tried once a minute"
    clock.now += 60.0
    assert put(store, "more")


def test_what_a_reader_holds_outlives_its_eviction(tmp_path: Path) -> None:
    clock = Clock()
    store = OutputStore(tmp_path, CAPACITY, "reader", clock=clock)
    put(OutputStore(tmp_path, CAPACITY), "key")
    clock.now += 1
    assert store.hold("key")
    OutputStore(tmp_path, 1).sweep()
    assert not store.path("key").exists()
    assert store.hold("key")
    assert is_whole(store.held_path("key"))
    clock.now += HOLD_S - 1
    store.release()
    assert store.hold("key")
    clock.now += HOLD_S + 1
    store.release()
    assert not store.hold("key")


def test_what_is_pinned_stays_until_the_last_pin_is_taken_back(tmp_path: Path) -> None:
    clock = Clock()
    store = OutputStore(tmp_path, CAPACITY, "reader", clock=clock)
    assert not store.pin("key")
    put(OutputStore(tmp_path, CAPACITY), "key")
    clock.now += 1
    assert store.pin("key")
    assert store.pin("key")
    store.path("key").unlink()
    store.let_go()
    clock.now += 10 * HOLD_S
    store.release()
    store.unpin("key")
    clock.now += 10 * HOLD_S
    store.release()
    assert store.hold("key")
    assert is_whole(store.held_path("key"))
    store.unpin("key")
    store.unpin("key")
    clock.now += HOLD_S - 1
    store.release()
    assert store.hold("key")
    clock.now += HOLD_S + 1
    store.release()
    assert not store.pin("key")
    assert not names(tmp_path)


def test_a_pinned_file_that_others_removed_is_linked_again_or_gone(tmp_path: Path) -> None:
    store = OutputStore(tmp_path, CAPACITY, "reader")
    put(store, "key")
    assert store.pin("key")
    store.held_path("key").unlink()
    assert store.hold("key")
    assert store.held_path("key").exists()
    store.held_path("key").unlink()
    store.path("key").unlink()
    assert not store.hold("key")
    store.unpin("key")


def test_a_takedown_takes_pinned_files_too(tmp_path: Path) -> None:
    store = OutputStore(tmp_path, CAPACITY, "reader")
    put(store, "key")
    assert store.pin("key")
    store.forget("key")
    assert not store.hold("key")
    store.unpin("key")
    assert not names(tmp_path)


def test_a_pin_from_before_a_takedown_takes_back_no_later_one(tmp_path: Path) -> None:
    store = OutputStore(tmp_path, CAPACITY, "reader")
    put(store, "key")
    assert store.pin("key")
    store.forget("key")
    assert not store.seems_there("key")
    put(store, "key")
    assert store.pin("key")
    store.unpin("key")
    store.let_go()
    store.path("key").unlink()
    assert store.hold("key")
    store.unpin("key")
    store.let_go()
    assert not store.hold("key")


def test_a_file_that_is_not_whole_is_no_output(tmp_path: Path) -> None:
    store = OutputStore(tmp_path, CAPACITY, "reader")
    put(store, "key", 500)
    path = store.path("key")
    path.write_bytes(path.read_bytes()[:200])
    assert not store.hold("key")
    assert not path.exists()


@given(st.binary(max_size=64))
@settings(max_examples=50)
def test_no_bytes_make_the_check_fail(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("files") / "file"
    path.write_bytes(data)
    assert not is_whole(path)
    path.write_bytes(content(len(data)))
    assert is_whole(path)
    path.write_bytes(content(len(data)) + b"x")
    assert not is_whole(path)


def test_what_the_dead_left_is_cleaned_and_what_the_living_have_is_not(tmp_path: Path) -> None:
    living = OutputStore(tmp_path, CAPACITY, "living")
    dead = OutputStore(tmp_path, CAPACITY, "dead")
    put(living, "key")
    assert living.hold("key")
    assert dead.hold("key")
    left = tmp_path / "parts" / "left"
    left.write_bytes(b"half")
    for abandoned in (left, dead.held_path("key").parent):
        os.utime(abandoned, (1, 1))
    OutputStore(tmp_path, CAPACITY)
    assert not left.exists()
    assert not dead.held_path("key").exists()
    assert is_whole(living.held_path("key"))
    assert len(list((tmp_path / "held").iterdir())) == 1
    living.close()
    assert not list((tmp_path / "held").iterdir())


def test_a_reader_shows_that_it_lives_and_goes_on_if_it_was_taken_for_dead(tmp_path: Path) -> None:
    clock = Clock()
    store = OutputStore(tmp_path, CAPACITY, "reader", clock=clock)
    put(store, "key")
    assert store.hold("key")
    own = store.held_path("key").parent
    os.utime(own, (1, 1))
    clock.now += HOLD_S - 1
    assert store.hold("key")
    clock.now += 2
    store.release()
    assert own.stat().st_mtime == pytest.approx(time.time(), abs=60)
    os.utime(own, (1, 1))
    OutputStore(tmp_path, CAPACITY)
    assert not own.exists()
    clock.now += HOLD_S
    assert store.hold("key")
    assert is_whole(store.held_path("key"))


def test_files_that_vanish_are_absent(tmp_path: Path) -> None:
    store = OutputStore(tmp_path, CAPACITY)
    put(store, "key")
    store.path("key").unlink()
    assert not store.has("key")
    assert put(store, "key")
    store.forget("key")
    assert not store.has("key")


def test_what_is_awaited_is_looked_for_more_often_than_what_is_not(tmp_path: Path) -> None:
    clock = Clock()
    store = OutputStore(tmp_path, CAPACITY, "reader", clock=clock)
    assert not store.hold("key")
    put(OutputStore(tmp_path, CAPACITY), "key")
    clock.now += 0.1
    assert not store.hold("key")
    assert store.hold("key", awaited=True)
    assert store.hold("key")


def test_what_vanishes_while_it_is_held_and_nobody_looks_leaves_no_link(tmp_path: Path) -> None:
    clock = Clock()
    store = OutputStore(tmp_path, CAPACITY, "reader", clock=clock)
    put(store, "key")
    assert store.hold("key")
    store.path("key").unlink()
    clock.now += HOLD_S + 1
    assert not store.hold("key")
    assert not store.held_path("key").exists()


def test_of_many_held_files_those_found_last_stay_and_all_that_are_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_store, "_MOST_HELD", 2)
    store = OutputStore(tmp_path, CAPACITY, "reader")
    for number in range(8):
        put(store, str(number), 10)
        assert store.pin(str(number)) if number < 3 else store.hold(str(number))
        store.release()
    held = [str(number) for number in range(8) if store.held_path(str(number)).exists()]
    assert held == ["0", "1", "2", "6", "7"]


def test_a_store_that_cannot_be_read_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = OutputStore(tmp_path, CAPACITY, "reader")
    for key in ("one", "other"):
        put(store, key)
        # A directory by the name of the link: opening it is an error, though not that of absence.
        store.held_path(key).mkdir()
        assert not store.hold(key)
        assert not store.hold(f"no {key}")
    (record,) = caplog.records
    assert "cannot be read" in record.getMessage()


def test_a_look_at_many_files_holds_none_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    store = OutputStore(tmp_path, 1 << 20, "reader", clock=clock)
    keys = [str(number) for number in range(1000)]
    for key in keys[::2]:
        put(store, key)
    asked: list[Path] = []
    exists = os.path.exists

    def look(path: Path) -> bool:
        asked.append(path)
        return exists(path)

    monkeypatch.setattr(os.path, "exists", look)
    monkeypatch.setattr(os, "link", None)
    for _ in range(2):
        assert [key for key in keys if store.seems_there(key)] == keys[::2]
        assert len(asked) == 1000
    # What is absent is looked for again, as in ``hold``.
    put(OutputStore(tmp_path, 1 << 20), "1")
    clock.now += 2.0
    assert store.seems_there("1")


def test_what_seemed_to_be_there_and_cannot_be_held_is_known_to_be_absent(tmp_path: Path) -> None:
    store = OutputStore(tmp_path, CAPACITY, "reader")
    for takedown in (False, True):
        put(store, "a")
        assert store.seems_there("a")
        if takedown:
            store.forget("a")
        else:
            store.path("a").unlink()
        assert not store.hold("a")
        assert not store.seems_there("a")
        store.look_again()


def test_no_error_of_a_held_file_reaches_who_lets_go_of_it(tmp_path: Path) -> None:
    clock = Clock()
    store = OutputStore(tmp_path, CAPACITY, "reader", clock=clock)
    for let_go in (store.release, store.let_go):
        put(store, "a")
        assert store.hold("a")
        # Nobody may remove a directory in this way, whoever runs the test.
        store.held_path("a").unlink()
        store.held_path("a").mkdir()
        clock.now += 2 * HOLD_S
        let_go()
        store.held_path("a").rmdir()
        assert store.hold("a")
        store.let_go()


def test_an_error_of_a_pinned_file_is_none_of_who_looks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = OutputStore(tmp_path, CAPACITY, "reader")
    put(store, "a")
    assert store.pin("a")
    # A name that is too long for the file system is an error that ``Path.exists`` raises.
    monkeypatch.setattr(store, "held_path", lambda _: tmp_path / ("x" * 300))
    assert store.hold("a")


def test_a_takedown_leaves_no_copy_that_idle_readers_hold(tmp_path: Path) -> None:
    clock = Clock()
    readers = [OutputStore(tmp_path, CAPACITY, name, clock=clock) for name in ("idle", "at work")]
    put(readers[0], "key")
    assert all(reader.hold("key") for reader in readers)
    for reader in readers:
        ago = time.time() - 3 * HOLD_S
        os.utime(reader.held_path("key").parent, (ago, ago))
    clock.now += 3 * HOLD_S
    readers[1].hold("key")
    readers[1].release()
    OutputStore(tmp_path, CAPACITY).forget("key")
    assert [reader.held_path("key").exists() for reader in readers] == [False, True]
    clock.now += HOLD_S + 1
    readers[1].release()
    assert not readers[1].held_path("key").exists()


def test_what_was_made_with_other_weights_is_found_by_nobody(tmp_path: Path) -> None:
    store, other = (OutputStore(tmp_path, CAPACITY, name) for name in ("reader", "other"))
    for key in ("held", "stored"):
        assert put(store, key)
    assert store.hold("held")
    store.empty()
    for one in (store, other):
        one.look_again()
        assert not one.hold("held")
        assert not one.hold("stored")
    assert put(store, "held"), "what is made anew is stored"
    other.look_again()
    assert other.hold("held")


def test_what_is_let_go_is_found_only_where_it_is_still_stored(tmp_path: Path) -> None:
    store = OutputStore(tmp_path, CAPACITY, "reader")
    for key in ("kept", "gone"):
        assert put(store, key)
        assert store.hold(key)
    store.path("gone").unlink()
    store.let_go()
    assert store.hold("kept")
    assert not store.hold("gone")
    assert len(names(tmp_path / "held")) == 1
