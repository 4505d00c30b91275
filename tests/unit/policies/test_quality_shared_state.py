"""The shared state: shared by processes, never torn, never stuck, removed at the end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from vllm_mm_ext.base import shared_file
from vllm_mm_ext.base.engine_figures import BOARD_BYTES, ENGINES
from vllm_mm_ext.base.shared_state import (
    DECISIONS,
    KEY_BYTES,
    Decision,
    EngineLoad,
    SharedState,
    file_name,
    join_state,
    open_state,
    private_state,
    remove_abandoned,
    service_name,
)
from vllm_mm_ext.config.quality_settings import QualitySettings, TierSettings
from vllm_mm_ext.policies.quality.controller import QualityController
from vllm_mm_ext.policies.quality.service_tier import ServiceTier

SERVICE = "test"
# As an engine publishes it, and as an API server does for an engine that does not.
LOAD = EngineLoad(5.0, 0.5, 3.0, 1.0, 8.0, 0.75, 9000.0, 1.5, 0.02)
HEARD = EngineLoad(6.0, 0.25, 1.0, 0.0, 8.0)
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / file_name(SERVICE)


def opened(path: Path) -> SharedState:
    return open_state(SERVICE, [path.parent])


@pytest.fixture
def state(path: Path) -> Iterator[SharedState]:
    made = opened(path)
    yield made
    made.close()


def key(number: int) -> bytes:
    """Keys of one number modulo the table's size compete for the same places."""
    return number.to_bytes(8, "little") + bytes(KEY_BYTES - 8)


def decision(number: int, used: float = 0.0) -> Decision:
    return Decision(number % 3, number, 1.0, used)


def test_keeps_decisions_loads_and_the_tier_for_every_user_of_the_file(
    state: SharedState, path: Path
) -> None:
    other = opened(path)
    assert other.find(key(7)) is None
    state.keep(key(7), decision(7))
    assert other.find(key(7)) == decision(7)
    other.keep(key(7), decision(8))
    assert state.find(key(7)) == decision(8)
    load = EngineLoad(12.0, 0.95, 3, 4, 64)
    ServiceTier(TierSettings(), state, engines=2).heard(1, load)
    assert other.loads(2) == {1: load}
    assert ServiceTier(TierSettings(), other).level(12.0) == 2
    other.close()


@pytest.mark.usefixtures("state")
def test_only_the_owner_can_read_it(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_full_stretch_of_the_table_gives_up_its_longest_unused_decision(
    state: SharedState,
) -> None:
    keys = [key(5 + turn * DECISIONS) for turn in range(9)]
    for age, one in enumerate(keys[:8]):
        state.keep(one, decision(age, used=float(100 - age)))
    state.keep(keys[0], decision(0, used=200.0))
    state.keep(keys[8], decision(8, used=201.0))
    assert [state.find(one) is not None for one in keys] == [True] * 7 + [False, True]


def test_a_half_written_record_counts_as_absent_and_is_replaced(
    state: SharedState, path: Path
) -> None:
    state.keep(key(0), decision(1))
    whole = path.read_bytes()
    at = whole.index(key(0) + (1).to_bytes(4, "little"))
    with path.open("r+b") as file:
        file.seek(at + KEY_BYTES + 5)
        file.write(b"\\x55\\x55")
    assert state.find(key(0)) is None
    state.keep(key(0), decision(2))
    assert state.find(key(0)) == decision(2)


# --- processes ------------------------------------------------------------------------------------


def _write_much(path: Path, start: int) -> None:
    state = opened(path)
    tier = ServiceTier(TierSettings(), state, engines=4)
    for turn in range(300):
        for slot in range(4):
            state.keep(key(slot), Decision(start, start * 1000 + turn, start, start))
        state.keep(key(100 + start), decision(turn))
        tier.heard(start, EngineLoad(float(turn), 0.0, turn, turn, 64))
    state.close()


def test_concurrent_writers_lose_nothing_and_readers_see_whole_records(
    state: SharedState, path: Path
) -> None:
    writers = [SPAWN.Process(target=_write_much, args=(path, start)) for start in range(1, 4)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        for slot in range(4):
            found = state.find(key(slot))
            if found is not None:
                assert found.tokens // 1000 == found.level == found.made == found.used
                seen += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen
    assert [state.find(key(100 + start)) for start in range(1, 4)] == [decision(299)] * 3
    assert [load.running for load in state.loads(4).values()] == [299] * 3


def _hold_lock(path: Path, ready: Connection) -> None:
    with opened(path).writing() as held:
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
    state: SharedState, holder: multiprocessing.process.BaseProcess
) -> None:
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGSTOP)
    state.keep(key(1), decision(1))
    assert state.find(key(1)) is None


def test_a_killed_writer_leaves_no_lock(
    state: SharedState, holder: multiprocessing.process.BaseProcess
) -> None:
    holder.kill()
    holder.join()
    state.keep(key(1), decision(1))
    assert state.find(key(1)) == decision(1)


# --- load -----------------------------------------------------------------------------------------


def test_engines_are_read_by_index(state: SharedState, path: Path) -> None:
    assert state.loads(2) == {}
    state.write_load(1, LOAD)
    assert state.loads(2) == {1: LOAD}
    state.write_load(0, replace(LOAD, running=1.0))
    assert state.loads(2) == {0: replace(LOAD, running=1.0), 1: LOAD}
    assert state.loads(1) == {0: replace(LOAD, running=1.0)}
    state.clear_load(0)
    assert state.loads(2) == {1: LOAD}
    other = opened(path)
    assert other.loads(2) == {1: LOAD}
    other.close()


def test_engines_past_the_table_take_no_other_engine_s_place(state: SharedState) -> None:
    state.write_load(0, LOAD)
    state.write_load(ENGINES, HEARD)
    assert state.loads(ENGINES + 1) == {0: LOAD}


def test_what_vllm_tells_replaces_no_figure_that_an_engine_publishes(state: SharedState) -> None:
    tier = ServiceTier(TierSettings(), state, engines=2)
    for _ in range(2):
        tier.heard(0, HEARD)
        tier.heard(1, HEARD)
        state.write_load(1, LOAD)
    tier.heard(1, HEARD)
    assert state.loads(2) == {0: HEARD, 1: LOAD}


def test_a_torn_load_counts_as_absent(state: SharedState, path: Path) -> None:
    state.write_load(0, LOAD)
    with path.open("r+b") as file:
        # The engines' figures come first.
        file.seek(BOARD_BYTES + 30)
        file.write(b"\xff")
    assert state.loads(1) == {}
    state.write_load(0, LOAD)
    assert state.loads(1) == {0: LOAD}


_WRITES = """
import select
import sys
from itertools import count
from pathlib import Path
from vllm_mm_ext.base.shared_state import EngineLoad, open_state
state = open_state("test", [Path(sys.argv[1])])
for number in count():
    state.write_load(0, EngineLoad(*[float(number)] * 9))
    if number % 1000 == 0 and select.select([sys.stdin], [], [], 0)[0]:
        break
"""


def test_a_reader_never_sees_half_a_load_of_another_process(state: SharedState, path: Path) -> None:
    command = [sys.executable, "-c", _WRITES, str(path.parent)]
    seen = set()
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as process:
        while len(seen) < 1000 and process.poll() is None:
            for load in state.loads(1).values():
                values = set(astuple(load))
                assert len(values) == 1
                seen |= values
        process.communicate("enough\n")
    assert process.returncode == 0
    assert len(seen) == 1000


def following(state: SharedState, engines: int = 2) -> QualityController:
    return QualityController(QualitySettings(), state, clock=lambda: 5.0, engines=engines)


def test_quality_follows_what_engines_publish(state: SharedState) -> None:
    controller = following(state)
    state.write_load(0, LOAD)
    state.write_load(1, LOAD)
    assert controller.level() == 0
    state.write_load(0, replace(LOAD, time=5.5, running=8))
    # On average 6.5 requests on 8 slots.
    assert controller.level() == 2


def test_a_loaded_engine_counts_before_the_ones_ahead_of_it_have_published(
    state: SharedState,
) -> None:
    state.write_load(1, replace(LOAD, running=8))
    assert following(state).level() == 2


@pytest.mark.parametrize(("backlog_s", "level"), [(0.0, 0), (4.0, 1), (12.0, 2)])
def test_a_backlog_of_encoder_work_raises_the_tier(
    state: SharedState, backlog_s: float, level: int
) -> None:
    load = replace(LOAD, kv_usage=0.0, running=0, waiting=0, backlog_s=backlog_s)
    state.write_load(0, load)
    controller = following(state, engines=1)
    assert controller.level() == level
    # Nor does what vLLM tells of the same engine hide it.
    ServiceTier(TierSettings(), state).heard(0, replace(HEARD, time=5.0))
    assert controller.level() == level


# --- the file's life ------------------------------------------------------------------------------


def test_a_single_api_server_s_name_is_unique_and_several_have_one_in_common() -> None:
    assert service_name(1, 0) != service_name(1, 0)
    assert service_name(2, -1) == service_name(2, -1)
    with SPAWN.Pool(2) as pool:
        names = pool.starmap(service_name, [(2, 0), (2, 1)])
    assert names == [service_name(2, -1)] * 2


def test_a_step_of_the_machine_s_clock_changes_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = service_name(2, -1)
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: 12345.0)
    assert psutil.Process().create_time() < 1e6 + time.monotonic()
    assert service_name(2, -1) == before


def test_the_name_goes_when_all_api_servers_have_the_state(path: Path) -> None:
    engine = opened(path)
    first = join_state(SERVICE, 2, [path.parent])
    assert path.exists()
    second = join_state(SERVICE, 2, [path.parent])
    assert not path.exists()
    engine.write_load(0, LOAD)
    second.keep(key(3), decision(3))
    assert first.find(key(3)) == decision(3)
    assert first.loads(1) == second.loads(1) == {0: LOAD}
    for one in (engine, first, second):
        one.close()


def test_the_file_goes_with_the_last_process_that_uses_it(path: Path) -> None:
    first, second = opened(path), opened(path)
    second.keep(key(3), decision(3))
    second.close()
    assert first.find(key(3)) == decision(3)
    assert path.exists()
    del first
    assert not path.exists()


def test_the_file_goes_when_its_process_ends_without_a_word(path: Path) -> None:
    process = SPAWN.Process(target=opened, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert not path.exists()


def test_states_that_follow_others_have_a_file_of_their_own(path: Path) -> None:
    for running in (1.0, 2.0):
        made = opened(path)
        assert made.loads(1) == {}
        made.write_load(0, replace(LOAD, running=running))
        made.close()


def test_a_private_state_has_no_name_and_works_alike() -> None:
    made = private_state()
    made.keep(key(3), decision(3))
    assert made.find(key(3)) == decision(3)
    made.close()


def test_what_a_killed_service_left_is_removed_and_what_is_in_use_is_not(
    tmp_path: Path, path: Path
) -> None:
    used = open_state("used", [tmp_path])
    other = tmp_path / "something"
    other.touch()
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_hold_lock, args=(path, theirs))
    process.start()
    assert ours.recv()
    remove_abandoned(tmp_path)
    assert path.exists()
    process.kill()
    process.join()
    assert path.exists()
    remove_abandoned(tmp_path)
    assert used.path is not None
    assert sorted(tmp_path.iterdir()) == sorted([used.path, other])
    used.close()


def test_a_file_of_that_name_that_is_a_link_is_not_followed(tmp_path: Path, path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    path.symlink_to(target)
    with pytest.raises(OSError, match="symbolic"):
        opened(path)
    remove_abandoned(tmp_path)
    assert target.read_text() == "kept"


def test_where_one_directory_cannot_have_the_file_the_next_one_has_it(
    tmp_path: Path, path: Path
) -> None:
    made = open_state(SERVICE, [tmp_path / "missing", tmp_path])
    assert made.path == path
    made.close()


def test_opening_a_file_that_is_removed_meanwhile_makes_a_new_one(
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
    first, second = opened(path), opened(path)
    first.keep(key(1), decision(1))
    assert second.find(key(1)) == decision(1)
    first.close()
    second.close()
