"""Traces of KV accesses, what both pools make of them, and bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vllm_mm_ext.config.kv_settings import KVSettings
from vllm_mm_ext.tools.bench.bench_cli import app
from vllm_mm_ext.tools.bench.commands import AccessKind
from vllm_mm_ext.tools.bench.harness import BenchContext
from vllm_mm_ext.tools.bench.kv_bounds import informed, least_blocks, optimum, working_set
from vllm_mm_ext.tools.bench.kv_costs import Costs
from vllm_mm_ext.tools.bench.kv_generated import generated
from vllm_mm_ext.tools.bench.kv_replay import replay, run
from vllm_mm_ext.tools.bench.kv_replay_pools import Miss, Replay
from vllm_mm_ext.tools.bench.kv_rules import RULES
from vllm_mm_ext.tools.bench.kv_trace import TRACES, Access, Item, KVTrace
from vllm_mm_ext.tools.bench.kv_traffic import CONCURRENT, TRAFFIC

BLOCK = 4


def trace_of(*requests: tuple[int, ...]) -> KVTrace:
    """Requests one after the other, of these blocks and one more token each."""
    accesses = tuple(Access(None, len(blocks) * BLOCK + 1, 0, blocks) for blocks in requests)
    events = tuple((n, begins) for n in range(len(requests)) for begins in (True, False))
    return KVTrace(BLOCK, 64, accesses, events)


@pytest.mark.parametrize("kind", AccessKind)
def test_traces_of_the_repository_are_what_was_written(kind: AccessKind, tmp_path: Path) -> None:
    trace = KVTrace.read(TRACES / f"{kind}.txt")
    assert len(trace.accesses) > 100
    trace.write(tmp_path / "again.txt", "again")
    assert KVTrace.read(tmp_path / "again.txt") == trace


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("block 4\nhidden 8\n> 1 - 4+0 0", "line 3.*numbered from 0"),
        ("block 4\nhidden 8\n< 0", "line 3.*not begun"),
        ("block 4\nhidden 8\n> 0 - x 0", "line 3"),
        ("block 4\n> 0 - 4+0 0", "no line tells hidden"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        KVTrace.parse(text, "trace")


@pytest.mark.parametrize("kind", TRAFFIC)
def test_the_same_seed_is_the_same_traffic(kind: AccessKind) -> None:
    assert list(TRAFFIC[kind](3)) == list(TRAFFIC[kind](3)) != list(TRAFFIC[kind](4))


@pytest.mark.parametrize("kind", TRAFFIC)
def test_generated_traces_are_as_the_recorded_ones_of_the_same_prompts(kind: AccessKind) -> None:
    made, recorded = generated(kind, 0), KVTrace.read(TRACES / f"{kind}.txt")
    assert KVTrace.parse(made.text("generated"), "again") == made
    assert len(made.accesses) == len(recorded.accesses)
    if kind in CONCURRENT:
        return  # An engine lets requests begin in the order in which others end.
    for one, other in zip(made.accesses, recorded.accesses, strict=True):
        assert (one.session, one.output) == (other.session, other.output)
        assert [item.length for item in one.items] == [item.length for item in other.items]
        assert one.prompt == pytest.approx(other.prompt, rel=0.1)
    assert working_set(made) == pytest.approx(working_set(recorded), rel=0.1)


PATHS = st.lists(
    st.sampled_from([(0, 1, 2), (0, 1, 3, 4), (0, 5), (6, 7), (8,), (9, 10, 11), (6, 12)]),
    min_size=1,
    max_size=30,
)


@given(PATHS, st.integers(5, 14))
@settings(max_examples=25)
def test_no_pool_and_no_policy_saves_more_than_the_optimum(
    paths: list[tuple[int, ...]], blocks: int
) -> None:
    trace = trace_of(*paths)
    costs = Costs(trace)
    most = optimum(trace, costs, blocks) + 1e-6
    for config in (None, KVSettings()):
        assert Replay(trace, blocks, config).run().saved <= most
    assert all(saved <= most for saved in informed(trace, costs, blocks).values())


@given(PATHS)
@settings(max_examples=15)
def test_room_for_everything_finds_all_that_was_there(paths: list[tuple[int, ...]]) -> None:
    trace = trace_of(*paths)
    blocks = 40
    most = optimum(trace, Costs(trace), blocks)
    for config in (None, KVSettings()):
        found = Replay(trace, blocks, config).run()
        assert found.saved == pytest.approx(most)
        assert not any(found.misses.values())


def test_the_working_set_is_what_will_be_used_again() -> None:
    trace = trace_of((0, 1), (2, 3, 4), (0, 1), (5,), (2, 3, 4))
    assert working_set(trace) == 5
    assert least_blocks(trace) == 4


def test_kv_of_items_whose_outputs_are_held_saves_prefill_only() -> None:
    access = Access(None, 17, 0, (0, 1, 2, 3), (Item(0, 2, 11),))
    trace = KVTrace(BLOCK, 64, (access,), ((0, True), (0, False)))
    kept, bare = Costs(trace, lambda _: True), Costs(trace)
    assert bare.saved(access, 2) == kept.saved(access, 2)
    assert bare.saved(access, 3) == kept.saved(access, 3) + 5.5


def test_misses_are_told_apart() -> None:
    again = [(0, 1, 2, 3), (4, 5, 6), (7, 8, 9)]
    found = Replay(trace_of(*again * 6), 9, KVSettings()).run()
    assert {Miss.ranking, Miss.tail_first} >= found.misses.keys()
    assert sum(found.misses.values()) > 0


@pytest.mark.parametrize("kind", [AccessKind.conversations, AccessKind.scans])
def test_what_the_pool_saves_is_near_what_can_be_known(kind: AccessKind) -> None:
    found = replay(KVTrace.read(TRACES / f"{kind}.txt"), 1.0)
    assert found.plugin.saved >= 0.9 * found.best
    assert found.plugin.saved >= found.stock.saved
    assert found.plugin.saved <= found.optimum


def test_other_traces_can_be_replayed_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    trace_of((0, 1), (2, 3), (0, 1), (2, 3), (0, 1)).write(file, "two prompts")
    arguments = ["kv-replay", "--trace", str(file), "--room", "1", "--json", str(tmp_path / "j")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "own, room for 1" in (tmp_path / "j").read_text()


def test_what_each_rule_gains_is_told_and_all_is_as_before_afterwards(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    trace_of(*[(0, 1), (2, 3), (4, 5)] * 5).write(file, "three prompts")
    found = [
        run(BenchContext(1, tmp_path), traces=[file], rooms=[1.0], ablate=ablate)
        for ablate in (False, True)
    ]
    assert found[0].rows == found[1].rows
    told = [note.partition(":")[0] for note in found[1].notes]
    assert told[-len(RULES) :] == list(RULES)
