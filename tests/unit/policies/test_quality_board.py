"""The board: shared by processes, never torn, never stuck, removed at the end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from vllm_mm_ext.base import shared_file
from vllm_mm_ext.config.quality_settings import TierSettings
from vllm_mm_ext.policies.quality.board import (
    DECISIONS,
    KEY_BYTES,
    Board,
    Decision,
    join,
    private,
    remove_abandoned,
)
from vllm_mm_ext.policies.quality.load_signal import LoadSignal
from vllm_mm_ext.policies.quality.tiers import LoadSample

# More users than join, so that the file keeps its name.
MANY = 99
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / f"mm_ext-board-{os.getuid()}-test"


@pytest.fixture
def board(path: Path) -> Iterator[Board]:
    made = join(path, MANY)
    yield made
    made.close()


def key(number: int) -> bytes:
    """Keys of one number modulo the table's size compete for the same places."""
    return number.to_bytes(8, "little") + bytes(KEY_BYTES - 8)


def decision(number: int, used: float = 0.0) -> Decision:
    return Decision(number % 3, False, number, 1.0, used)


def test_keeps_decisions_samples_and_the_tier_for_every_user_of_the_file(
    board: Board, path: Path
) -> None:
    other = join(path, MANY)
    assert other.find(key(7)) is None
    board.keep(key(7), decision(7))
    assert other.find(key(7)) == decision(7)
    other.keep(key(7), decision(8))
    assert board.find(key(7)) == decision(8)
    sample = LoadSample(0.95, 3, 4, 64, 12.0)
    LoadSignal(TierSettings(), board, engines=2).report(1, sample)
    assert other.samples(range(2)) == [sample]
    assert LoadSignal(TierSettings(), other).level(12.0) == 2
    other.close()


@pytest.mark.usefixtures("board")
def test_only_the_owner_can_read_it(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_full_stretch_of_the_table_gives_up_its_longest_unused_decision(board: Board) -> None:
    keys = [key(5 + turn * DECISIONS) for turn in range(9)]
    for age, one in enumerate(keys[:8]):
        board.keep(one, decision(age, used=float(100 - age)))
    board.keep(keys[0], decision(0, used=200.0))
    board.keep(keys[8], decision(8, used=201.0))
    assert [board.find(one) is not None for one in keys] == [True] * 7 + [False, True]


def test_a_half_written_record_counts_as_absent_and_is_replaced(board: Board, path: Path) -> None:
    board.keep(key(0), decision(1))
    whole = path.read_bytes()
    at = whole.index(key(0) + (1).to_bytes(4, "little"))
    with path.open("r+b") as file:
        file.seek(at + KEY_BYTES + 5)
        file.write(b"\\x55\\x55")
    assert board.find(key(0)) is None
    board.keep(key(0), decision(2))
    assert board.find(key(0)) == decision(2)


# --- processes ------------------------------------------------------------------------------------


def _write_much(path: Path, start: int) -> None:
    board = join(path, MANY)
    signal_ = LoadSignal(TierSettings(), board, engines=4)
    for turn in range(300):
        for slot in range(4):
            board.keep(key(slot), Decision(start, True, start * 1000 + turn, start, start))
        board.keep(key(100 + start), decision(turn))
        signal_.report(start, LoadSample(0.0, turn, turn, 64, float(turn)))
    board.close()


def test_concurrent_writers_lose_nothing_and_readers_see_whole_records(
    board: Board, path: Path
) -> None:
    writers = [SPAWN.Process(target=_write_much, args=(path, start)) for start in range(1, 4)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        for slot in range(4):
            found = board.find(key(slot))
            if found is not None:
                assert found.tokens // 1000 == found.level == found.made == found.used
                seen += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen
    assert [board.find(key(100 + start)) for start in range(1, 4)] == [decision(299)] * 3
    assert [sample.running for sample in board.samples(range(4))] == [299] * 3


def _hold_lock(path: Path, ready: Connection) -> None:
    with join(path, MANY).writing() as held:
        ready.send(held)
        threading.Event().wait()


@pytest.fixture
def holder(path: Path) -> Iterator[multiprocessing.process.BaseProcess]:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_hold_lock, args=(path, theirs))
    process.start()
    assert ours.recv()
    yield process
    process.kill()
    process.join()


def test_a_writer_does_not_wait_for_one_that_hangs(
    board: Board, holder: multiprocessing.process.BaseProcess
) -> None:
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGSTOP)
    board.keep(key(1), decision(1))
    assert board.find(key(1)) is None


def test_a_killed_writer_leaves_no_lock(
    board: Board, holder: multiprocessing.process.BaseProcess
) -> None:
    holder.kill()
    holder.join()
    board.keep(key(1), decision(1))
    assert board.find(key(1)) == decision(1)


# --- the file's life ------------------------------------------------------------------------------


def test_the_name_goes_when_all_processes_have_the_board(path: Path) -> None:
    first = join(path, 2)
    assert path.exists()
    second = join(path, 2)
    assert not path.exists()
    second.keep(key(3), decision(3))
    assert first.find(key(3)) == decision(3)
    first.close()
    second.close()


def test_a_private_board_has_no_name_and_works_alike() -> None:
    board = private()
    board.keep(key(3), decision(3))
    assert board.find(key(3)) == decision(3)
    board.close()


def test_what_a_killed_service_left_is_removed_and_what_is_in_use_is_not(path: Path) -> None:
    left = path.with_name(f"{path.name}-killed")
    used = join(path, MANY)
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_hold_lock, args=(left, theirs))
    process.start()
    assert ours.recv()
    remove_abandoned(path.parent)
    assert left.exists()
    process.kill()
    process.join()
    assert left.exists()
    remove_abandoned(path.parent)
    assert not left.exists()
    assert path.exists()
    used.close()


def test_a_file_of_that_name_that_is_a_link_is_not_followed(tmp_path: Path, path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    path.symlink_to(target)
    with pytest.raises(OSError, match="symbolic"):
        join(path, 1)
    remove_abandoned(tmp_path)
    assert target.read_text() == "kept"


def test_joining_a_file_that_is_removed_meanwhile_makes_a_new_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[[Path, int], bool] = shared_file.is_at
    looks: list[bool] = []

    def remove_first(where: Path, descriptor: int) -> bool:
        if not looks:
            looks.append(True)
            path.unlink()
        return real(where, descriptor)

    monkeypatch.setattr(shared_file, "is_at", remove_first)
    first = join(path, 2)
    second = join(path, 2)
    first.keep(key(1), decision(1))
    assert second.find(key(1)) == decision(1)
    first.close()
    second.close()
