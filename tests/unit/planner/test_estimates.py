"""First tokens and throughput of a simulated load, on an engine of first come, first served."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.planner.estimate import (
    Figures,
    Service,
    Timing,
    estimate,
    figures_of,
    follow_up_s,
    simulate,
)
from vllm_mm_ext.planner.host_work import PICTURE, MediumWork
from vllm_mm_ext.planner.rates import HostCosts, Rates, RatesRange
from vllm_mm_ext.planner.request_tokens import ItemTokens, MediumTokens, RequestTokens, Stages
from vllm_mm_ext.planner.step_contents import EncoderWork, RequestPart, StepContents, step_contents
from vllm_mm_ext.planner.step_costs import StepCosts

STEP = StepCosts(0.01, 0.001, 1e-7, 0.002, 1e-4, 1e-8, 0.001, 0.001, 1e-5, 1e-9, 1e-5)
HOST = HostCosts(
    0.004,
    0.002,
    1e-6,
    1e-4,
    0.003,
    0.01,
    {"h264": 0.01, PICTURE: 0.02},
    0.01,
    0.001,
    0.005,
    1e-6,
    1e-3,
    1.0,
    1.0,
    0.003,
    1e-6,
)
RATES = Rates(STEP, HOST)
VIDEO = MediumWork("h264", 20.0, 2.0, 4.0, 2000, 2400)


@dataclass
class Request:
    computed: int = 0
    answered: int = 0


class FirstComeEngine:
    """Requests in the order of coming, each step up to so many tokens; items go with a prompt."""

    def __init__(self, prompt: int, output: int, *, tokens: int = 64, encoder: int = 0) -> None:
        self._prompt, self._output, self._tokens = prompt, output, tokens
        self._encoder = EncoderWork(encoder, 0.0, 0)
        self._requests: dict[int, Request] = {}
        self._planned: dict[int, int] = {}

    def add(self, number: int, now: float) -> None:
        assert now >= 0
        self._requests[number] = Request()

    def begin(self, now: float) -> StepContents | None:
        assert now >= 0
        left, parts = self._tokens, []
        self._planned = {}
        for number, one in self._requests.items():
            wanted = self._prompt + one.answered - one.computed
            tokens = min(left, wanted)
            if tokens:
                self._planned[number] = tokens
                items = [self._encoder] if self._encoder.vision and not one.computed else []
                parts.append(RequestPart(tokens, one.computed, self._prompt, items))
                left -= tokens
        return step_contents(parts) if parts else None

    def end(self, now: float) -> list[tuple[int, bool]]:
        assert now >= 0
        got = []
        for number, tokens in self._planned.items():
            one = self._requests[number]
            one.computed += tokens
            if one.computed == self._prompt + one.answered:
                one.answered += 1
                got.append((number, one.answered == self._output))
        for number, last in got:
            if last:
                del self._requests[number]
        return got


def service(concurrency: int, media: tuple[MediumWork, ...] = (), cores: int = 64) -> Service:
    return Service(concurrency, media, decode_workers=2, cores=cores)


def only_decoding(threads: float) -> HostCosts:
    """A second of a decode worker for each medium, and nothing else."""
    nothing = (0.0,) * 5
    return HostCosts(*nothing, 1.0, {}, *nothing, threads, 1.0)


def run(rates: Rates, concurrency: int = 1, *, media: int = 0, output: int = 4) -> Figures:
    engine = FirstComeEngine(100, output, encoder=2000 * media)
    return simulate(service(concurrency, (VIDEO,) * media), rates, engine).figures


def test_a_lone_request_takes_the_sum_of_its_parts() -> None:
    found = run(RATES, media=1)
    first = STEP.seconds(
        StepContents(prompts=1, prefill=64, pairs=64 * 32, encodes=1, items=1, vision=2000)
    )
    second = STEP.seconds(StepContents(prompts=1, prefill=36, pairs=36 * 82))
    host = HOST.request + VIDEO.main_s(HOST) + VIDEO.probe_s(HOST)
    host += VIDEO.decode_s(HOST) + VIDEO.preprocess_s(HOST) + HOST.token
    assert found.ttft_p50_s == pytest.approx(host + first + second)


def test_a_follow_up_decodes_and_encodes_nothing_and_computes_its_question() -> None:
    item = ItemTokens("video", 1200, 300, 300)
    stages = Stages(8, 600, 600, 600, 0, 20)
    medium = MediumTokens("video", 4.0, (640, 360), (448, 252), 0.0, stages, (item,) * 2, 600)
    request = RequestTokens(text=40, output=8, media=(medium,))
    rates = msgspec.structs.replace(RATES, step=msgspec.structs.replace(STEP, inputs=1e-6))
    question = 40 * 1e-4 + 1e-8 * 40 * (660 + 8 + 20)
    step = STEP.step + STEP.prompts + question + 2400 * 1e-6
    host = HOST.request + 0.003 + 1e-6 * VIDEO.sent + HOST.token
    assert follow_up_s((VIDEO,), request, rates) == pytest.approx(host + step)


COSTS = st.sampled_from([("step", name) for name in StepCosts.__struct_fields__]) | st.sampled_from(
    [
        ("host", name)
        for name in HostCosts.__struct_fields__
        if name not in ("megapixel", "decode_threads", "engine_threads")
    ]
)


@given(COSTS, st.floats(1.0, 10.0), st.integers(0, 2), st.integers(1, 6))
@settings(max_examples=60)
def test_no_cost_that_rises_makes_a_lone_request_faster(
    cost: tuple[str, str], factor: float, media: int, output: int
) -> None:
    part, name = cost
    costs = getattr(RATES, part)
    dearer = msgspec.structs.replace(costs, **{name: factor * getattr(costs, name)})
    before = run(RATES, media=media, output=output)
    after = run(msgspec.structs.replace(RATES, **{part: dearer}), media=media, output=output)
    assert after.ttft_p50_s >= before.ttft_p50_s * (1 - 1e-9)
    assert after.requests_per_s <= before.requests_per_s * (1 + 1e-9)


@given(st.floats(0.1, 10.0), st.integers(1, 12), st.integers(0, 2))
@settings(max_examples=40)
def test_a_machine_of_another_speed_gives_the_same_load_in_other_times(
    factor: float, concurrency: int, media: int
) -> None:
    before = run(RATES, concurrency, media=media)
    after = run(RATES.scaled(step=factor, host=factor), concurrency, media=media)
    assert after.ttft_p50_s == pytest.approx(factor * before.ttft_p50_s, rel=1e-6)
    assert after.requests_per_s == pytest.approx(before.requests_per_s / factor, rel=1e-6)


@given(st.integers(1, 16), st.integers(0, 2), st.integers(1, 8), st.integers(1, 4))
@settings(max_examples=40)
def test_clients_get_no_more_answers_than_their_waiting_allows(
    concurrency: int, media: int, output: int, cores: int
) -> None:
    engine = FirstComeEngine(100, output, encoder=2000 * media)
    found = simulate(service(concurrency, (VIDEO,) * media, cores), RATES, engine)
    alone = run(RATES, media=media, output=output)
    # Little's law: nobody is answered faster than alone.
    assert found.figures.requests_per_s <= concurrency * alone.requests_per_s * (1 + 1e-6)
    assert all(0 <= share <= 1 for share in found.busy.values())


@given(st.integers(1, 8), st.integers(0, 2), st.floats(0.3, 1.0), st.floats(1.0, 3.0))
@settings(max_examples=30)
def test_the_range_holds_the_middle(concurrency: int, media: int, low: float, high: float) -> None:
    rates = RatesRange.around(RATES, step=(low, high), host=(low, high))
    found = estimate(
        service(concurrency, (VIDEO,) * media),
        rates,
        lambda: FirstComeEngine(100, 4, encoder=2000 * media),
    )
    for name in Figures.__annotations__:
        least, middle, most = (getattr(one, name) for one in (found.low, found.middle, found.high))
        assert least <= middle <= most
    assert found.busy[found.limit] == max(found.busy.values())


def test_decodes_beyond_the_workers_wait_for_their_turn() -> None:
    # With everything else free, two workers decode two videos at a time.
    host = only_decoding(threads=1.0)
    free = StepCosts(*(1e-9 for _ in StepCosts.__struct_fields__))
    engine = FirstComeEngine(1, 1)
    found = simulate(service(6, (VIDEO,)), Rates(free, host), engine).figures
    assert found.requests_per_s == pytest.approx(2.0, rel=0.01)
    assert found.ttft_p50_s == pytest.approx(3.0, rel=0.01)


def test_work_that_wants_more_cores_than_there_are_shares_them() -> None:
    host = only_decoding(threads=4.0)
    free = StepCosts(*(1e-9 for _ in StepCosts.__struct_fields__))
    found = simulate(
        service(2, (VIDEO,), cores=4), Rates(free, host), FirstComeEngine(1, 1)
    ).figures
    assert found.ttft_p50_s == pytest.approx(2.0, rel=0.01)


def test_what_clients_saw_counts_while_all_of_them_have_a_request() -> None:
    # Two clients, answers of a second each, in turns; the first and the last ones differ.
    timings = [Timing(0.0, 5.0, 6.0, 3), Timing(0.0, 5.5, 6.5, 3)]
    for number in range(8):
        sent = 6.0 + number / 2
        timings.append(Timing(sent, sent + 0.4, sent + 1.0, 4))
    found = figures_of(timings, 2)
    assert found.ttft_p50_s == pytest.approx(0.4)
    assert found.itl_p50_s == pytest.approx(0.2)
    assert found.requests_per_s == pytest.approx(2.0)
