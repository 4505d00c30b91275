"""How busy engines are: what one process writes, others read."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from scheduler_harness import Play, make_scheduler, request

from vllm_mm_ext.adapters.quality.engine_figures import sample_of
from vllm_mm_ext.config.quality_settings import QualitySettings
from vllm_mm_ext.policies.quality.board import private
from vllm_mm_ext.policies.quality.controller import QualityController
from vllm_mm_ext.policies.scheduler.load_publisher import LoadPublisher
from vllm_mm_ext.policies.scheduler.signal import (
    EngineLoad,
    LoadReader,
    LoadWriter,
    load_file,
    remove_abandoned,
)

LOAD = EngineLoad(5.0, 0.5, 0.75, 3, 1, 8, 9000, 1.5, 0.02)


def test_engines_are_read_by_index(tmp_path: Path) -> None:
    path = tmp_path / "load"
    reader = LoadReader(path)
    assert list(reader.loads(2)) == []
    first, second = LoadWriter(path, 0), LoadWriter(path, 1)
    second.write(LOAD)
    assert list(reader.loads(2)) == [(1, LOAD)]
    first.write(replace(LOAD, running=1.0))
    assert dict(reader.loads(2)) == {0: replace(LOAD, running=1.0), 1: LOAD}
    assert list(reader.loads(1)) == [(0, replace(LOAD, running=1.0))]
    first.close()
    assert list(reader.loads(2)) == [(1, LOAD)]
    assert list(LoadReader(path).loads(2)) == [(1, LOAD)]
    second.close()
    assert not path.exists()
    assert list(reader.loads(2)) == []


def test_engines_that_follow_others_in_a_process_are_read_from_their_own_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "load"
    reader = LoadReader(path)
    for running in (1.0, 2.0):
        writer = LoadWriter(path, 0)
        writer.write(replace(LOAD, running=running))
        assert [load.running for _, load in reader.loads(1)] == [running]
        writer.close()


def test_a_torn_record_counts_as_absent(tmp_path: Path) -> None:
    path = tmp_path / "load"
    writer = LoadWriter(path, 0)
    writer.write(LOAD)
    with open(path, "r+b") as file:
        file.seek(20)
        file.write(b"\xff")
    assert list(LoadReader(path).loads(1)) == []
    writer.write(LOAD)
    assert list(LoadReader(path).loads(1)) == [(0, LOAD)]


_WRITES = """
import sys
from pathlib import Path
from vllm_mm_ext.policies.scheduler.signal import EngineLoad, LoadWriter
writer = LoadWriter(Path(sys.argv[1]), 0)
for number in range(20_000):
    writer.write(EngineLoad(*[float(number)] * 9))
print("written", flush=True)
sys.stdin.readline()
"""


def _writing(path: Path) -> subprocess.Popen[str]:
    """A process that writes much, says so and ends when it is told."""
    command = [sys.executable, "-c", _WRITES, str(path)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def test_a_reader_never_sees_half_a_record_of_another_process(tmp_path: Path) -> None:
    path = tmp_path / "load"
    process = _writing(path)
    reader, seen = LoadReader(path), set()
    while not select.select([process.stdout], [], [], 0)[0]:
        for _, load in reader.loads(1):
            values = set(astuple(load))
            assert len(values) == 1
            seen |= values
    process.communicate("")
    assert process.returncode == 0
    assert len(seen) > 1


def test_what_killed_services_left_is_removed_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    # Ids tell nothing: that of another container's process may be a dead one's here.
    used, killed = (tmp_path / f"mm_ext-load-{os.getuid()}-1-{n}.00" for n in range(2))
    other = tmp_path / "something"
    other.touch()
    writer = LoadWriter(used, 0)
    process = _writing(killed)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([used, killed, other])
    process.kill()
    process.communicate()
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([used, other])
    writer.close()


def test_a_scheduler_publishes_its_backlog_and_takes_it_back() -> None:
    scheduler = make_scheduler()
    scheduler._publisher = LoadPublisher(scheduler)
    path = load_file(os.getpid())
    play = Play(scheduler)
    play.add(request("text", text=32, answer=60), request("v", items=[512] * 12))
    backlogs = []
    while play.busy:
        play.step()
        ((_, load),) = LoadReader(path).loads(1)
        backlogs.append(load.backlog_tokens)
        assert 0 <= load.kv_usage <= load.kv_pressure <= 1
    assert max(backlogs) >= 4000
    assert backlogs[-1] == 0
    assert (load.running, load.waiting, load.slots) == (0, 0, 4)
    assert load.itl_s > 0
    scheduler._publisher.close()
    assert not path.exists()


def following(loads: dict[int, EngineLoad]) -> QualityController:
    """Follows what the engines of a service of two have published."""
    return QualityController(
        QualitySettings(),
        private(),
        clock=lambda: 5.0,
        published=lambda: [(engine, sample_of(load)) for engine, load in loads.items()],
        engines=2,
    )


def test_quality_follows_what_engines_publish() -> None:
    loads = {0: LOAD, 1: LOAD}
    controller = following(loads)
    assert controller.level() == 0
    loads[0] = replace(LOAD, time=5.5, running=8)
    # On average 6.5 requests on 8 slots.
    assert controller.level() == 2


def test_a_loaded_engine_counts_before_the_ones_ahead_of_it_have_published() -> None:
    loads = {1: replace(LOAD, running=8)}
    controller = following(loads)
    assert controller.level() == 2


@pytest.mark.parametrize(("backlog_s", "level"), [(0.0, 0), (4.0, 1), (12.0, 2)])
def test_a_backlog_of_encoder_work_raises_the_tier(backlog_s: float, level: int) -> None:
    load = replace(LOAD, kv_usage=0.0, running=0, waiting=0, backlog_s=backlog_s)
    controller = QualityController(
        QualitySettings(), private(), clock=lambda: 5.0, published=lambda: [(0, sample_of(load))]
    )
    assert controller.level() == level
