"""Instances that share encoder outputs, on vLLM's scheduler: what is encoded where, and when."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from encoder_cache_harness import Engine, Item, request
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ECConnectorOutput
from vllm.v1.request import RequestStatus

from vllm_mm_ext.adapters.encoder_cache.failed_loads import FailedLoads
from vllm_mm_ext.adapters.encoder_cache.transport_options import JOB, OWN
from vllm_mm_ext.adapters.scheduler.mm_scheduler import MMExtScheduler
from vllm_mm_ext.policies.encoder_cache.expectations import Expectations

VIDEO = [Item(f"segment {number}", 40) for number in range(5)]
NAMES = [item.name for item in VIDEO]
SCHEDULERS = pytest.mark.parametrize("scheduler", [Scheduler, MMExtScheduler])


def run(engine: Engine, name: str, items: list[Item], job: str | None = None) -> None:
    add(engine, name, items, job)
    engine.run()


def add(engine: Engine, name: str, items: list[Item], job: str | None = None) -> None:
    one = request(name, items)
    if job is not None:
        one.ec_transfer_params = {JOB: job}
    engine.add(one)


def consumer(shared: Path, wait_s: float = 5.0, **options: Any) -> Engine:
    engine = Engine(shared=shared, **{"role": "ec_consumer", **options})
    engine.connector._expectations = Expectations(wait_s, lambda: engine.now_s)
    began = time.time()
    engine.connector.transport.files._clock = lambda: began + engine.now_s
    return engine


def ended(engine: Engine, name: str) -> bool:
    return name not in engine.scheduler.requests


@SCHEDULERS
def test_what_one_instance_encoded_the_other_loads(tmp_path: Path, scheduler: Any) -> None:
    encoder = Engine(shared=tmp_path, role="ec_producer", scheduler=scheduler)
    run(encoder, "first", VIDEO)
    assert sorted(encoder.encoded) == NAMES
    assert encoder.worker.transport.stored == len(VIDEO)
    engine = consumer(tmp_path, scheduler=scheduler)
    run(engine, "first", VIDEO)
    assert engine.encoded == []
    assert sorted(engine.loaded) == NAMES
    assert engine.connector.figures()["transfer_loaded"] == len(VIDEO)
    # Both tiers have it now: the store is not needed any more.
    encoder.connector.forget(NAMES)
    run(engine, "second", VIDEO)
    assert engine.encoded == []


def test_what_comes_from_elsewhere_is_kept_on_the_host(tmp_path: Path) -> None:
    run(Engine(shared=tmp_path, role="ec_producer"), "first", VIDEO)
    # The device holds three of the five.
    engine = consumer(tmp_path, device=130)
    for number in range(3):
        run(engine, str(number), VIDEO)
        engine.connector.transport.forget(NAMES)
    assert engine.encoded == []
    assert len(engine.connector._tier) == len(VIDEO)


@pytest.mark.parametrize("role", ["ec_consumer", "ec_both"])
@pytest.mark.parametrize("second_runner", [False, True])
def test_what_an_engine_encoded_itself_is_kept_on_the_host(
    tmp_path: Path, role: str, second_runner: bool
) -> None:
    engine = consumer(tmp_path, role=role, device=90, second_runner=second_runner)
    for number in range(3):
        run(engine, str(number), VIDEO)
        engine.connector.transport.forget(NAMES)
    assert sorted(engine.encoded) == NAMES
    assert len(engine.connector._tier) == len(VIDEO)


def test_what_is_named_is_stored_also_where_the_encoder_has_had_it_for_long(tmp_path: Path) -> None:
    # Of five items two are on the device, and all on the host.
    encoder = Engine(shared=tmp_path, role="ec_producer", device=90)
    run(encoder, "first", VIDEO)
    encoder.connector.transport.forget(NAMES)
    run(encoder, "second", VIDEO)
    assert sorted(encoder.encoded) == NAMES
    engine = consumer(tmp_path)
    run(engine, "first", VIDEO)
    assert engine.encoded == []


def test_a_store_that_was_cleaned_away_ends_no_encoder(tmp_path: Path) -> None:
    encoder = Engine(shared=(root := tmp_path / "store"), role="ec_producer")
    shutil.rmtree(root)
    root.write_text("no directory")
    run(encoder, "first", VIDEO)
    assert encoder.worker.transport.stored == 0
    root.unlink()
    run(encoder, "second", VIDEO)
    assert encoder.worker.transport.stored == len(VIDEO)


def test_a_second_encoder_does_not_encode_what_the_first_has_stored(tmp_path: Path) -> None:
    run(Engine(shared=tmp_path, role="ec_producer"), "first", VIDEO)
    second = Engine(shared=tmp_path, role="ec_producer")
    run(second, "first", [*VIDEO, Item("new", 30)])
    assert second.encoded == ["new"]


def test_what_is_not_there_is_encoded_and_counted(tmp_path: Path) -> None:
    run(Engine(shared=tmp_path, role="ec_producer"), "first", VIDEO[:3])
    engine = consumer(tmp_path)
    run(engine, "first", VIDEO)
    assert sorted(engine.encoded) == NAMES[3:]
    figures = engine.connector.figures()
    assert (figures["transfer_loaded"], figures["transfer_missed"]) == (3, 2)
    # A consumer stores nothing.
    run(other := consumer(tmp_path), "first", VIDEO)
    assert sorted(other.encoded) == NAMES[3:]


@SCHEDULERS
def test_segments_are_prefilled_as_they_come_and_others_are_served_meanwhile(
    tmp_path: Path, scheduler: Any
) -> None:
    engine = consumer(tmp_path, scheduler=scheduler, slots=2)
    add(engine, "video", VIDEO, "job")
    for number in range(len(VIDEO)):
        for _ in range(3):
            engine.step()
        video = engine.scheduler.requests["video"]
        # Not past the first segment that is not there, and up to it from the second on.
        assert video.num_computed_tokens <= 8 + 40 * number
        assert not number or video.num_computed_tokens == 8 + 40 * number
        run_text(engine, f"text {number}")
        run(Engine(shared=tmp_path, role="ec_producer"), "e", VIDEO[: number + 1])
    engine.run()
    assert engine.encoded == []
    assert engine.answers["video"] == 3
    assert len(engine.connector._expectations) == 0


def run_text(engine: Engine, name: str) -> None:
    add(engine, name, [])
    for _ in range(50):
        if ended(engine, name):
            return
        engine.step()
    raise AssertionError(f"{name} waits behind what is awaited")


@SCHEDULERS
@pytest.mark.parametrize("there", [0, 2])
def test_what_an_encoder_leaves_undone_is_encoded_here(
    tmp_path: Path, scheduler: Any, there: int
) -> None:
    run(Engine(shared=tmp_path, role="ec_producer"), "e", VIDEO[:there])
    engine = consumer(tmp_path, scheduler=scheduler)
    add(engine, "video", VIDEO, "job")
    for _ in range(5):
        engine.step()
    assert engine.encoded == []
    engine.connector.encode_over("job")
    engine.run()
    assert sorted(engine.encoded) == NAMES[there:]
    assert engine.answers["video"] == 3


@SCHEDULERS
def test_nobody_waits_for_an_encoder_for_ever(tmp_path: Path, scheduler: Any) -> None:
    engine = consumer(tmp_path, wait_s=5.0, scheduler=scheduler)
    add(engine, "video", VIDEO, "job")
    while not engine.encoded:
        engine.step()
        assert engine.now_s < 6.0
    assert engine.now_s >= 5.0
    engine.run()
    assert engine.answers["video"] == 3
    assert engine.connector.figures()["transfer_waits_ended"] == 1


@SCHEDULERS
def test_a_request_that_goes_while_it_waits_leaves_nothing(tmp_path: Path, scheduler: Any) -> None:
    engine = consumer(tmp_path, scheduler=scheduler)
    add(engine, "video", VIDEO, "job")
    for _ in range(5):
        engine.step()
    engine.abort("video")
    engine.run()
    assert len(engine.connector._expectations) == 0


@SCHEDULERS
def test_what_another_request_encodes_here_ends_the_wait(tmp_path: Path, scheduler: Any) -> None:
    engine = consumer(tmp_path, scheduler=scheduler, slots=4)
    add(engine, "waits", VIDEO, "job")
    engine.step()
    run_all = request("encodes", VIDEO)
    engine.add(run_all)
    engine.run()
    assert sorted(engine.encoded) == NAMES
    assert engine.answers["waits"] == 3
    assert engine.now_s < 4.0


@SCHEDULERS
def test_what_only_a_client_names_is_neither_stored_nor_loaded_nor_awaited(
    tmp_path: Path, scheduler: Any
) -> None:
    items = [Item(f"client's name{OWN}", 40), VIDEO[0]]
    encoder = Engine(shared=tmp_path, role="ec_both", scheduler=scheduler)
    run(encoder, "first", items)
    run(encoder, "second", items)
    assert encoder.worker.transport.stored == 1
    engine = consumer(tmp_path, scheduler=scheduler)
    run(engine, "first", items, "job")
    assert engine.encoded == [items[0].name]
    assert engine.loaded == [VIDEO[0].name]
    assert engine.now_s < 1.0


def test_a_first_look_at_a_long_video_holds_what_the_step_reaches(tmp_path: Path) -> None:
    video = [Item(f"part {number}", 10) for number in range(60)]
    run(Engine(shared=tmp_path, role="ec_producer"), "first", video)
    engine = consumer(tmp_path, scheduler=MMExtScheduler, chunk=64)
    add(engine, "video", video)
    engine.step()
    assert 0 < len(list((tmp_path / "held").rglob("*.safetensors"))) < 10
    engine.run()
    assert engine.encoded == []


def with_embeddings(name: str) -> Any:
    """A request whose first item is embeddings of its client's."""
    one = request(name, VIDEO)
    one.mm_features[0].modality = "prompt_embeds"
    return one


@pytest.mark.parametrize("second_runner", [False, True])
def test_embeddings_that_clients_send_are_not_stored(tmp_path: Path, second_runner: bool) -> None:
    # The device keeps all of it, and gives up all of it.
    for device, times in ((256, 2), (90, 4)):
        engine = Engine(shared=tmp_path, device=device, second_runner=second_runner)
        for number in range(times):
            engine.add(with_embeddings(str(number)))
            engine.run()
        assert not engine.worker.transport.files.path(NAMES[0]).exists()
        assert engine.worker.transport.files.path(NAMES[1]).exists()


def test_embeddings_of_a_client_that_are_in_the_store_are_read(tmp_path: Path) -> None:
    run(Engine(shared=tmp_path, role="ec_producer"), "first", VIDEO)
    engine = consumer(tmp_path)
    engine.add(with_embeddings("embeddings"))
    engine.run()
    assert engine.answers["embeddings"] == 3


@SCHEDULERS
def test_what_comes_while_the_engine_has_no_time_for_it_prolongs_the_wait(
    tmp_path: Path, scheduler: Any
) -> None:
    engine = consumer(tmp_path, wait_s=5.0, scheduler=scheduler)
    one = request("video", VIDEO)
    one.ec_transfer_params = {JOB: "job"}
    for number in range(len(VIDEO)):
        assert engine.connector.awaits(one, number)
        engine.now_s += 4.0
        run(Engine(shared=tmp_path, role="ec_producer"), "e", VIDEO[: number + 1])
    assert not engine.connector.awaits(one, len(VIDEO) - 1)
    assert engine.connector.figures()["transfer_waits_ended"] == 0


def test_an_engine_that_also_writes_stores_again_what_only_its_host_tier_has(
    tmp_path: Path,
) -> None:
    engine = Engine(shared=tmp_path, role="ec_both", device=90)
    run(engine, "first", VIDEO)
    engine.connector.transport.forget(NAMES)
    run(engine, "second", VIDEO)
    assert sorted(engine.encoded) == NAMES
    assert engine.worker.transport.stored == 2 * len(VIDEO)


@pytest.mark.parametrize(
    ("role", "asked", "told"),
    [
        ("ec_producer", None, True),
        ("ec_both", None, False),
        ("ec_both", {JOB: "job"}, False),
        ("ec_both", {"wanted": True}, True),
        ("ec_consumer", None, False),
    ],
)
def test_names_of_items_are_told_to_proxies_alone(
    tmp_path: Path, role: str, asked: Any, told: bool
) -> None:
    engine = Engine(shared=tmp_path, role=role)
    one = request("video", [VIDEO[0], Item(f"client's{OWN}", 40)])
    one.ec_transfer_params = asked
    _, found = engine.connector.request_finished(one)
    assert (list(found) if found else None) == (NAMES[:1] if told else None)


@pytest.mark.parametrize("depth", [1, 2])
def test_what_a_plan_under_way_names_stays_however_long_steps_take(
    tmp_path: Path, depth: int
) -> None:
    encoder = Engine(shared=tmp_path, role="ec_producer")
    run(encoder, "first", VIDEO)
    engine = consumer(tmp_path, scheduler=MMExtScheduler, depth=depth)
    add(engine, "video", VIDEO)
    engine.step()
    # The step before it takes so long.
    engine.now_s += 1000.0
    encoder.connector.transport.forget(NAMES)
    engine.run()
    assert sorted(engine.loaded) == NAMES
    assert engine.answers["video"] == 3
    for number in range(depth):
        run_text(engine, f"text {number}")
    files = engine.connector.transport.files
    assert not files._pinned
    engine.now_s += 1000.0
    run_text(engine, "text")
    assert not list((tmp_path / "held").rglob("*.safetensors"))


def test_new_weights_are_not_given_what_a_plan_of_before_named(tmp_path: Path) -> None:
    run(Engine(shared=tmp_path, role="ec_producer"), "first", VIDEO)
    engine = consumer(tmp_path)
    run(engine, "old", VIDEO)
    assert engine.encoded == []
    engine.reset()
    run(engine, "new", VIDEO)
    assert sorted(engine.encoded) == NAMES


def test_an_engine_that_another_took_for_dead_reads_what_the_store_still_has(
    tmp_path: Path,
) -> None:
    run(Engine(shared=tmp_path, role="ec_producer"), "first", VIDEO)
    engine = consumer(tmp_path, scheduler=MMExtScheduler, depth=2)
    add(engine, "video", VIDEO)
    engine.step()
    shutil.rmtree(tmp_path / "held")
    engine.run()
    assert sorted(engine.loaded) == NAMES
    assert engine.answers["video"] == 3


@pytest.mark.parametrize("damage", ["gone", "damaged"])
@pytest.mark.parametrize("second_runner", [False, True])
@pytest.mark.parametrize(
    ("scheduler", "depth"), [(Scheduler, 1), (MMExtScheduler, 1), (MMExtScheduler, 2)]
)
def test_where_an_output_cannot_be_read_nobody_is_answered_without_it(
    tmp_path: Path, scheduler: Any, depth: int, second_runner: bool, damage: str
) -> None:
    run(Engine(shared=tmp_path, role="ec_producer"), "first", VIDEO)
    engine = consumer(
        tmp_path, role="ec_both", scheduler=scheduler, depth=depth, second_runner=second_runner
    )
    engine.kv.may_be_wrong = True
    schedule = engine.scheduler.schedule
    lost: list[str] = []

    def losing(*args: Any) -> Any:
        output = schedule(*args)
        if not lost:
            lost.extend(output.ec_connector_metadata.transport.loads)
            for path in tmp_path.rglob("*.safetensors") if lost else ():
                path.write_bytes(b"damaged") if damage == "damaged" else path.unlink()
        return output

    engine.add(request("text", [], answer=20))
    engine.step()
    engine.scheduler.schedule = losing
    # The second one finds the KV of the first before anybody knows that it is of nothing.
    for name in ("first", "second"):
        engine.add(request(name, VIDEO, begins="both"))
        engine.step()
    engine.run()
    assert lost
    assert set(engine.encoded) == set(NAMES)
    assert engine.answers == {"text": 20, "first": 3, "second": 3}
    engine.kv.may_be_wrong = False
    # What is made here takes the place of what was lost, for others as well.
    run(engine, "again", VIDEO)
    run(other := consumer(tmp_path), "first", VIDEO)
    assert other.encoded == []


@SCHEDULERS
@pytest.mark.parametrize("goes_on", [False, True])
def test_where_an_output_cannot_be_read_a_session_that_waits_ends_no_engine(
    tmp_path: Path, scheduler: Any, goes_on: bool
) -> None:
    run(Engine(shared=tmp_path, role="ec_producer"), "first", VIDEO)
    engine = consumer(tmp_path, role="ec_both", scheduler=scheduler)
    session, update = (request("session", [], text=40) for _ in range(2))
    session.resumable = update.resumable = True
    engine.add(session)
    while session.status != RequestStatus.WAITING_FOR_STREAMING_REQ:
        engine.step()
    add(engine, "video", VIDEO)
    output = engine.scheduler.schedule()
    assert output.ec_connector_metadata.transport.loads
    if goes_on:
        engine.scheduler.add_request(update)
        engine.kv.add(session)
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    engine.kv.may_be_wrong = True
    engine._finish(output)
    engine.kv.may_be_wrong = False
    engine.run()
    assert sorted(engine.encoded) == NAMES
    assert engine.answers == {"video": 3, "session": 6 if goes_on else 3}
    # vLLM 0.32 would go on without what it was told before.
    assert ended(engine, "session") != goes_on
    assert engine.scheduler.num_waiting_for_streaming_input == int(goes_on)


def test_what_a_request_that_was_just_preempted_was_given_of_nothing_is_dropped(
    tmp_path: Path,
) -> None:
    run(Engine(shared=tmp_path, role="ec_producer"), "first", VIDEO)
    engine = consumer(tmp_path, scheduler=MMExtScheduler, depth=2)
    engine.kv.may_be_wrong = True
    add(engine, "video", VIDEO)
    engine.step()
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    # As vLLM does where others need its blocks.
    (video,) = engine.scheduler.running
    engine.scheduler.running.clear()
    engine.scheduler._preempt_request(video, 0.0)
    engine.run()
    assert sorted(engine.encoded) == NAMES
    assert engine.answers == {"video": 3}


@pytest.mark.parametrize("shared", [True, False])
def test_a_request_that_may_have_to_begin_again_is_sent_with_all_inputs(
    tmp_path: Path, shared: bool
) -> None:
    """Otherwise one that ends with its step needs no inputs of what is in KV."""
    engine = Engine(scheduler=MMExtScheduler, shared=tmp_path if shared else None)
    for name in ("first", "second"):
        one = request(name, VIDEO, begins="both", answer=1)
        for feature in one.mm_features:
            feature.data = MultiModalKwargsItem.dummy()
        engine.add(one)
        output = engine.scheduler.schedule()
        engine._finish(output)
    (new,) = output.scheduled_new_reqs
    assert new.num_computed_tokens > 100
    assert all(feature.data for feature in new.mm_features) == shared


def test_what_any_worker_could_not_read_is_told() -> None:
    told = FailedLoads(frozenset({"a"})).aggregate(FailedLoads(frozenset({"b"})))
    assert told.keys == {"a", "b"}


def test_an_engine_whose_wrong_kv_may_have_been_passed_on_ends() -> None:
    engine = Engine()
    output = engine.scheduler.schedule()
    engine.scheduler.connector = object()
    meta = FailedLoads(frozenset({"a"}))
    result = SimpleNamespace(ec_connector_output=ECConnectorOutput(ec_connector_worker_meta=meta))
    with pytest.raises(RuntimeError, match="KV connector"):
        engine.scheduler.update_from_output(output, result)
