"""Requests that came without what the encoder takes, on vLLM's scheduler: loaded, or ended."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_cache_harness import Engine, Item, request
from vllm.multimodal.cache import engine_receiver_cache_from_config
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_mm_ext.adapters.encoder_cache import bare_items
from vllm_mm_ext.adapters.encoder_cache.bare_items import BARE
from vllm_mm_ext.adapters.encoder_cache.transport_options import JOB
from vllm_mm_ext.adapters.patches import all_or_none
from vllm_mm_ext.adapters.scheduler.mm_scheduler import MMExtScheduler
from vllm_mm_ext.policies.encoder_cache.expectations import Expectations

VIDEO = [Item(f"segment {number}", 40) for number in range(5)]
NAMES = [item.name for item in VIDEO]
SCHEDULERS = pytest.mark.parametrize("scheduler", [Scheduler, MMExtScheduler])


def bare_data() -> MultiModalKwargsItem:
    field = MultiModalBatchedField(keep_on_cpu=True)
    return MultiModalKwargsItem({BARE: MultiModalFieldElem(data=torch.tensor(1000), field=field)})


def bare(name: str, items: list[Item], job: str | None = None, **options: Any) -> Request:
    one = request(name, items, **options)
    for feature in one.mm_features:
        feature.data = bare_data()
    if job is not None:
        one.ec_transfer_params = {JOB: job}
    return one


def encode(shared: Path, items: list[Item]) -> None:
    encoder = Engine(shared=shared, role="ec_producer")
    encoder.add(request("e", items))
    encoder.run()


def consumer(shared: Path, **options: Any) -> Engine:
    engine = Engine(shared=shared, role="ec_consumer", **options)
    engine.connector._expectations = Expectations(5.0, lambda: engine.now_s)
    began = time.time()
    engine.connector.transport.files._clock = lambda: began + engine.now_s
    return engine


def lose(engine: Engine, *names: str) -> None:
    """The store evicts outputs; who holds them keeps them."""
    for name in names:
        engine.connector.transport.files.path(name).unlink(missing_ok=True)


@SCHEDULERS
def test_bare_items_are_loaded_and_let_go_of_when_their_request_ends(
    tmp_path: Path, scheduler: Any
) -> None:
    encode(tmp_path, VIDEO)
    engine = consumer(tmp_path, scheduler=scheduler)
    engine.add(bare("video", VIDEO))
    engine.run()
    assert engine.answers["video"] == 3
    assert sorted(engine.loaded) == NAMES
    assert engine.encoded == []
    assert not engine.connector.transport.files._pinned
    assert not engine.connector._bare._left


@SCHEDULERS
def test_bare_items_are_prefilled_as_they_come(tmp_path: Path, scheduler: Any) -> None:
    engine = consumer(tmp_path, scheduler=scheduler)
    engine.add(bare("video", VIDEO, "job"))
    for number in range(len(VIDEO)):
        for _ in range(3):
            engine.step()
        computed = engine.scheduler.requests["video"].num_computed_tokens
        assert computed == (8 + 40 * number if number else computed)
        encode(tmp_path, VIDEO[: number + 1])
    engine.run()
    assert (engine.answers["video"], engine.encoded) == (3, [])


@SCHEDULERS
@pytest.mark.parametrize("there", [0, 3])
@pytest.mark.parametrize("ends", ["no job", "job over", "nothing comes"])
def test_a_request_whose_bare_items_do_not_come_ends_without_a_token(
    tmp_path: Path, scheduler: Any, there: int, ends: str
) -> None:
    if there:
        encode(tmp_path, VIDEO[:there])
    engine = consumer(tmp_path, scheduler=scheduler)
    engine.add(bare("video", VIDEO, None if ends == "no job" else "job"))
    if ends == "job over":
        for _ in range(5):
            engine.step()
        engine.connector.encode_over("job")
    engine.run()
    assert (engine.answers["video"], engine.encoded) == (0, [])
    assert (engine.now_s > 5.0) == (ends == "nothing comes")
    # The same request with whole items goes through.
    engine.add(request("video", VIDEO))
    engine.run()
    assert engine.answers["video"] == 3


@SCHEDULERS
def test_a_takedown_in_the_middle_of_a_request_ends_it_and_not_the_engine(
    tmp_path: Path, scheduler: Any
) -> None:
    encode(tmp_path, VIDEO)
    engine = consumer(tmp_path, scheduler=scheduler, device=50, host=10, chunk=32)
    engine.add(bare("video", VIDEO))
    while engine.scheduler.requests["video"].num_computed_tokens < 60:
        engine.step()
    engine.connector.forget(NAMES)
    engine.run()
    assert (engine.answers["video"], engine.encoded) == (0, [])


@SCHEDULERS
def test_a_tier_of_the_engine_alone_is_no_place_for_a_bare_item(
    tmp_path: Path, scheduler: Any
) -> None:
    """It may evict the item, and the request may need the item again."""
    engine = consumer(tmp_path, scheduler=scheduler)
    engine.add(request("whole", VIDEO, begins="x"))
    engine.run()
    for name in ("device and host", "prefix"):
        engine.add(bare(name, VIDEO, begins=name[:1] if name == "device and host" else "x"))
        engine.run()
        assert engine.answers[name] == 0
    encode(tmp_path, VIDEO)
    engine.connector.transport.look_again()
    engine.add(bare("both", VIDEO, begins="x"))
    engine.run()
    assert engine.answers["both"] == 3


@SCHEDULERS
@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_lost_a_request_has_all_its_tokens_or_none(
    tmp_path: Path, scheduler: Any, seed: int
) -> None:
    """Few blocks and small tiers, so that requests are preempted and need their items again."""
    dice = random.Random(seed)
    items = [Item(f"item {number}", 40) for number in range(8)]
    encode(tmp_path, items)
    engine = consumer(tmp_path, scheduler=scheduler, device=130, host=80, blocks=30, chunk=64)
    wanted: dict[str, int] = {}
    for number in range(30):
        name, answer = f"request {number}", dice.randint(20, 120)
        own = dice.sample(items, dice.randint(1, 4))
        make = bare if dice.random() < 0.7 else request
        engine.add(make(name, own, answer=answer, begins=f"group {number % 3}"))
        wanted[name] = answer if make is request else -answer
        for _ in range(dice.randint(0, 20)):
            engine.step()
        lose(engine, *(item.name for item in items if dice.random() < 0.3))
        if dice.random() < 0.3:
            encode(tmp_path, items)
        if dice.random() < 0.1:
            engine.abort(f"request {dice.randrange(number + 1)}")
            wanted = {key: wanted[key] for key in wanted if key in engine.scheduler.requests}
    engine.run()
    assert engine.preempted
    ends = {name: engine.answers[name] for name in wanted}
    assert all(
        ends[name] in ({answer} if answer > 0 else {0, -answer}) for name, answer in wanted.items()
    )
    assert not engine.connector.transport.files._pinned


def test_the_engine_s_processor_cache_never_holds_a_bare_item() -> None:
    with all_or_none("shared encoder outputs"):
        bare_items.install()
    config = Engine().scheduler.vllm_config
    held = engine_receiver_cache_from_config(config)
    field = MultiModalBatchedField()
    whole = MultiModalKwargsItem({"pixels": MultiModalFieldElem(data=torch.ones(4), field=field)})

    def ask(data: Any) -> Any:
        place = PlaceholderRange(0, 4)
        feature = MultiModalFeatureSpec(data, "video", "name", place, mm_hash="name")
        (found,) = held.get_and_update_features([feature])
        return found.data

    assert ask(whole) is whole
    lean = bare_data()
    assert ask(lean) is lean
    assert ask(None) is whole
