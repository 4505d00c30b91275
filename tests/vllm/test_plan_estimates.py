"""Estimates with the scheduler that serves: what its steps hold, and what clients would see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vllm_mm_ext.adapters.planning.estimates import SCHEDULER, Serving, estimate_load
from vllm_mm_ext.adapters.planning.loading import load
from vllm_mm_ext.adapters.planning.simulated_engine import EngineShape, SimulatedEngine
from vllm_mm_ext.planner.rates import HostCosts, Rates, RatesRange
from vllm_mm_ext.planner.request_tokens import (
    ItemTokens,
    MediumTokens,
    RequestTokens,
    Stages,
)
from vllm_mm_ext.planner.step_costs import StepCosts
from vllm_mm_ext.planner.workload import Video, Workload
from vllm_mm_ext.testing.checkpoints import checkpoint

STEP = StepCosts(0.01, 0.001, 1e-7, 0.002, 1e-4, 1e-8, 0.001, 0.001, 1e-5, 1e-9, 1e-5)
HOST = HostCosts(
    request=0.004,
    medium=0.002,
    sent_input=1e-6,
    token=1e-4,
    probe=0.003,
    decode=0.01,
    megapixel={"h264": 0.001},
    frame_megapixel=0.01,
    sound_second=0.001,
    preprocess=0.005,
    preprocess_input=1e-6,
    preprocess_sound_second=1e-3,
    decode_threads=1.0,
    engine_threads=1.0,
)
RATES = RatesRange.around(Rates(STEP, HOST), step=(0.9, 1.1), host=(0.9, 1.1))
SERVING = Serving(4, 256, 8192, EngineShape(32, 400, 512), decode_workers=2, cores=64)
# Three segments of 100 patches that become 25 tokens each, with 10 tokens around them.
ITEM = ItemTokens("video", 100, 25, 25)
VIDEO = MediumTokens(
    "video", 6.0, (640, 360), (140, 140), 0.0, Stages(6, 75, 75, 75, 0, 10), (ITEM,) * 3, 100
)
REQUEST = RequestTokens(text=500, output=5, media=(VIDEO,))
WORKLOAD = Workload((Video(6.0, 1.0, 640, 360, sound=False),), text=500, output=5)


@pytest.fixture(scope="module")
def config() -> Any:
    settings: dict[str, Any] = {}
    model = str(checkpoint("qwen2_5_vl"))
    return load(model, context=8192, mm_processor_kwargs={}, settings=settings).config


def engine(config: Any, *, slots: int = 4, blocks: int = 400) -> SimulatedEngine:
    config.scheduler_config.max_num_seqs = slots
    config.scheduler_config.max_num_batched_tokens = 256
    config.scheduler_config.scheduler_cls = SCHEDULER
    return SimulatedEngine(config, EngineShape(32, blocks, 512), REQUEST)


def test_every_token_is_computed_and_every_item_encoded_once(config: Any) -> None:
    made = engine(config)
    made.add(0, 0.0)
    steps, answered, now = [], 0, 0.0
    while (contents := made.begin(now)) is not None:
        steps.append(contents)
        now += STEP.seconds(contents)
        answered += len(made.end(now))
    assert answered == REQUEST.output
    assert sum(step.prefill for step in steps) == REQUEST.prompt
    assert all(step.prefill <= 256 for step in steps)
    assert sum(step.items for step in steps) == 3
    assert sum(step.vision for step in steps) == 300
    assert sum(step.vision_pairs for step in steps) == 300 * 100
    assert sum(step.decodes for step in steps) == REQUEST.output - 1
    assert [step.inputs for step in steps] == [300, *[0] * (len(steps) - 1)]


def test_no_more_requests_run_than_there_are_slots_or_blocks(config: Any) -> None:
    for slots, blocks, most in ((2, 400, 2), (8, 1 + 2 * REQUEST.kv_blocks(32), 2)):
        made = engine(config, slots=slots, blocks=blocks)
        for number in range(5):
            made.add(number, 0.0)
        now, done = 0.0, set()
        while (contents := made.begin(now)) is not None:
            assert contents.decodes <= most
            now += STEP.seconds(contents)
            done |= {number for number, last in made.end(now) if last}
        assert done == set(range(5))


def test_requests_that_do_not_fit_are_an_error(config: Any) -> None:
    serving = replace(SERVING, shape=EngineShape(32, REQUEST.kv_blocks(32) - 1, 512))
    with pytest.raises(ValueError, match="no room for a request"):
        estimate_load(config, serving, WORKLOAD, REQUEST, RATES)


def test_more_clients_get_more_answers_until_the_engine_is_busy(config: Any) -> None:
    found = [
        estimate_load(config, SERVING, replace(WORKLOAD, concurrency=count), REQUEST, RATES)
        for count in (1, 4, 12)
    ]
    rates = [one.middle.requests_per_s for one in found]
    assert rates[0] < rates[1] <= rates[2] * 1.05
    assert found[0].middle.ttft_p50_s < found[1].middle.ttft_p50_s < found[2].middle.ttft_p50_s
    assert found[2].limit == "engine"
    # Eight of twelve clients wait for a slot.
    assert found[2].middle.ttft_p50_s > 1.5 / rates[2]


def test_one_decode_worker_limits_what_is_decoded(config: Any) -> None:
    slow = Rates(STEP, replace_host(decode=2.0))
    rates = RatesRange.around(slow, step=(1, 1), host=(1, 1))
    serving = replace(SERVING, decode_workers=1)
    found = estimate_load(config, serving, replace(WORKLOAD, concurrency=4), REQUEST, rates)
    assert found.limit == "decode workers"
    assert found.middle.requests_per_s == pytest.approx(0.5, rel=0.1)


def replace_host(**costs: float) -> HostCosts:
    import msgspec

    return msgspec.structs.replace(HOST, **costs)
