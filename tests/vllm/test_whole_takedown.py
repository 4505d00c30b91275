"""A takedown over an API server and an engine finds everything, however often it is asked for.

vLLM's scheduler and its own encoder cache are real; of the engine only the model is played.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import kv_harness
import pytest
import torch
from blake3 import blake3
from scheduler_harness import Play, make_scheduler, request
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.request import Request

from vllm_mm_ext.adapters.kv.block_pool import MMExtBlockPool
from vllm_mm_ext.adapters.runtime import attach_runtime, detach_runtime
from vllm_mm_ext.adapters.sight import engine_part, own_part, whole_service, worker_part
from vllm_mm_ext.adapters.sight.own_part import OwnPart
from vllm_mm_ext.adapters.sight.whole_service import WholeService
from vllm_mm_ext.base.peers import Peers
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.policies.kv.control import NoBlockPoolError
from vllm_mm_ext.request.media_items import ImageItem, MediaItem
from vllm_mm_ext.request.trace import RequestTrace
from vllm_mm_ext.sight.request_log import Arrival, RequestLog, record_of
from vllm_mm_ext.sight.running_requests import RunningRequests
from vllm_mm_ext.sight.seen_media import unknown_digest

URL, DIGEST, OTHER_DIGEST, THIRD_DIGEST = "http://host/clip.mp4", "ab" * 32, "cd" * 32, "ef" * 32
FILE, OTHER = "file#video0", "other#video0"


class Engine:
    """vLLM's ``EngineCore`` with its worker, and the client that asks it.

    Attributes:
        encoded: Identifiers of the items that the worker encoded.
        outputs: The worker's encoder outputs.
        zeroed: KV blocks that the worker overwrote.
        sleeping_tags: As of vLLM's executor.
        fails: Takedowns are not answered.
    """

    mm_receiver_cache = None

    def __init__(self) -> None:
        # Other tests put the plugin's block pool into vLLM.
        self.scheduler = make_scheduler(plugin=False, change=_without_kv)
        self.manager = self.scheduler.encoder_cache_manager
        assert type(self.manager) is EncoderCacheManager
        self.play = Play(self.scheduler)
        self.model_executor = self.engine_core = self
        self.encoded: list[str] = []
        self.outputs: dict[str, torch.Tensor] = {}
        self.zeroed: list[int] = []
        self.sleeping_tags: set[str] = set()
        self.fails = False
        self._features: dict[str, Any] = {}

    def add(self, one: Request) -> None:
        self._features[one.request_id] = one.mm_features
        self.play.add(one)

    def step(self) -> None:
        """A step, in which the worker needs the outputs of all items of its requests."""
        output = self.play.step()
        for identifier in output.free_encoder_mm_hashes:
            self.outputs.pop(identifier, None)
        for name, indices in output.scheduled_encoder_inputs.items():
            for index in indices:
                identifier = self._features[name][index].identifier
                self.encoded.append(identifier)
                self.outputs[identifier] = torch.ones(4)
        cached = output.scheduled_cached_reqs
        begins = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        begins |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        for name, count in output.num_scheduled_tokens.items():
            for feature in self._features[name]:
                place, begin = feature.mm_position, begins[name]
                if begin < place.offset + place.length and place.offset < begin + count:
                    assert feature.identifier in self.outputs, "an encoder cache miss ends vLLM"

    def serve(self, one: Request) -> None:
        """A request, from its beginning to its end."""
        self.add(one)
        while one.request_id in self.scheduler.requests:
            self.step()

    def reset_encoder_cache(self) -> None:
        raise AssertionError("others' outputs are dropped as well")

    def collective_rpc(self, method: Any, args: Any = ()) -> list[Any]:
        runner = SimpleNamespace(
            encoder_cache=self.outputs,
            device=torch.device("cpu"),
            kv_cache_config=SimpleNamespace(has_mamba_layers=False),
            _zero_block_ids=self.zeroed.extend,
        )
        worker = SimpleNamespace(model_runner=runner)
        return [method(worker, *args)]

    async def call_utility_all_async(self, _: str, action: str, arguments: Any) -> list[Any]:
        if self.fails and action == "take_down":
            raise TimeoutError
        return [engine_part._ACTIONS[action](self, **arguments)]


def _without_kv(config: Any) -> None:
    config.additional_config["mm_ext"]["kv"] = {"enabled": False}


class Renderer:
    """vLLM's renderer, as far as takedowns know it."""

    mm_processor_cache = None
    model_config = SimpleNamespace(runner_type="generate")

    def __init__(self) -> None:
        self._mm_executor = ThreadPoolExecutor(1)
        self._executor = SimpleNamespace(_inner=self._mm_executor)


class Service:
    """A service of one API server and one engine."""

    def __init__(self, renderer: Renderer) -> None:
        config = MMExtConfig.from_additional_config({"mm_ext": {"sight": {"page": True}}})
        self.runtime = attach_runtime(config, ModelTraits(), renderer)
        self.running = RunningRequests()
        self.running.follow(RequestLog(300), server=0)
        assert self.running.log is not None
        own = OwnPart(0, renderer, self.running, self.running.log, None)
        self.engine = Engine()
        self.whole = WholeService(None, self.engine, Peers("takedown", 0, 1, own.answer), "m")

    def note(self, *hashes: str) -> None:
        """A request with the file was answered."""
        assert self.runtime.seen is not None
        self.runtime.seen.note(DIGEST, "video", URL, hashes)

    def known(self) -> set[str]:
        """Hashes that are known of the file."""
        assert self.runtime.seen is not None
        return self.runtime.seen.hashes_of([DIGEST])


@pytest.fixture(autouse=True)
def _freed_memory_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """To clear freed memory takes a second of CPU each time, and these tests do not look at it."""
    for module in (engine_part, worker_part, own_part):
        monkeypatch.setattr(module, "scrub", lambda *_: None)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(whole_service, "_BUSY_S", 0.0)
    renderer = Renderer()
    yield Service(renderer)
    detach_runtime(renderer)
    renderer._mm_executor.shutdown()


def check(manager: EncoderCacheManager) -> None:
    """The figures of vLLM's encoder cache agree with what it holds."""
    held = sum(manager.num_embeds_by_hash.values())
    assert manager.cached.keys() == manager.num_embeds_by_hash.keys()
    assert manager.num_free_slots == manager.cache_size - held
    assert manager.num_freeable_slots == manager.num_free_slots + sum(manager.freeable.values())


def test_with_vllms_own_encoder_cache_a_file_that_is_sent_again_is_encoded_again() -> None:
    engine = Engine()
    engine.serve(request("first", items=[64], digest="file"))
    engine.serve(request("idle", items=[64], digest="idle"))
    engine.add(request("runs", items=[64], digest="other", answer=1000))
    engine.step()
    told = engine_part.take_down(engine, [FILE])
    assert (told["outputs"], told["busy"]) == (1, 0)
    assert {*engine.outputs} == {"idle#video0", OTHER}
    check(engine.manager)
    # Another prompt, so that nothing of it is in the prefix cache.
    engine.serve(request("again", items=[64], digest="file", prompt=3))
    assert engine.encoded.count(FILE) == 2
    check(engine.manager)


def test_with_vllms_own_encoder_cache_an_item_in_use_stays_and_is_told() -> None:
    engine = Engine()
    engine.add(request("runs", items=[64], digest="file"))
    engine.step()
    told = engine_part.take_down(engine, [FILE])
    assert (told["outputs"], told["busy"]) == (0, 1)
    assert FILE in engine.outputs
    while engine.play.busy:
        engine.step()
    # A LoRA adapter's name may stand before a hash.
    engine.serve(request("adapted", items=[64], digest="a:b:file"))
    assert engine_part.take_down(engine, [FILE])["outputs"] == 2
    assert not engine.outputs
    check(engine.manager)


def test_kv_memory_that_a_sleeping_engine_gave_back_is_not_written_to() -> None:
    engine = Engine()
    engine.serve(request("first", items=[64], digest="file"))
    engine.sleeping_tags = {"weights", "kv_cache"}
    assert engine_part.take_down(engine, [FILE])["outputs"] == 1
    assert not engine.zeroed
    engine.sleeping_tags = {"weights"}
    engine_part.take_down(engine, [FILE])
    assert engine.zeroed


@pytest.mark.parametrize("asked", [(URL, None), (None, DIGEST)], ids=["by URL", "by digest"])
async def test_who_asks_again_after_an_incomplete_takedown_drops_what_was_left(
    service: Service, asked: tuple[str | None, str | None]
) -> None:
    engine = service.engine
    engine.serve(request("first", items=[64], digest="file"))
    service.note(FILE)
    engine.add(request("busy", items=[64], digest="file", prompt=3, answer=1000))
    engine.step()
    done = await service.whole.take_down(*asked)
    assert not done["complete"]
    assert "requests that engines still work on" in done["left"]
    assert FILE in engine.outputs
    engine.play.abort("busy")
    engine.play.drain()
    done = await service.whole.take_down(*asked)
    assert (done["complete"], done["outputs"], done["digests"]) == (True, 1, [DIGEST])
    assert not engine.outputs
    assert not service.known()
    done = await service.whole.take_down(*asked)
    assert (done["complete"], done["items"]) == (True, 0)


async def asked_again(service: Service) -> dict[str, Any]:
    """The answer to who asks again, as an engine gave no answer at first."""
    service.engine.fails = True
    with pytest.raises(TimeoutError):
        await service.whole.take_down(URL, None)
    service.engine.fails = False
    return await service.whole.take_down(URL, None)


async def test_who_asks_again_after_an_engine_gave_no_answer_drops_what_was_left(
    service: Service,
) -> None:
    service.engine.serve(request("first", items=[64], digest="file"))
    service.note(FILE)
    done = await asked_again(service)
    assert (done["complete"], done["outputs"]) == (True, 1)


async def test_what_a_request_that_was_ended_had_begun_is_known_when_it_is_asked_for_again(
    service: Service,
) -> None:
    traces = (
        RequestTrace(media=[MediaItem("video", URL, digest=DIGEST)], hashes={"begun"}),
        RequestTrace(held={URL: DIGEST}, hashes={"of a window"}),
        RequestTrace(media=[MediaItem("video", URL)], hashes={"of no known file"}),
    )
    requests = [service.running.begin("/v1/chat/completions", trace) for trace in traces]
    # None of them has a task that would take its end for that of the test.
    for one in requests:
        assert one is not None
        one.task = None

    def end() -> None:
        for one in requests:
            assert one is not None
            service.running.end(one, 0)

    asyncio.get_running_loop().call_later(0.05, end)
    done = await asked_again(service)
    assert (done["complete"], done["items"]) == (True, 3)


async def test_a_file_that_came_again_during_a_takedown_is_still_known(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.note("old")
    drop = service.engine.collective_rpc

    def with_newcomer(method: Any, args: Any = ()) -> list[Any]:
        service.note("new")
        return drop(method, args)

    monkeypatch.setattr(service.engine, "collective_rpc", with_newcomer)
    assert (await service.whole.take_down(URL, None))["complete"]
    assert "new" in service.known()


async def test_a_request_that_came_during_a_takedown_is_known_to_the_next_one(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.note("old")
    cancel = service.running.cancel

    async def with_newcomer(*asked: Any) -> Any:
        ended = await cancel(*asked)
        item = MediaItem("video", URL, digest=DIGEST)
        trace = RequestTrace(media=[item], tokens={"video": 1}, hashes={"new"})
        assert service.running.begin("/v1/chat/completions", trace) is not None
        service.note("new")
        return ended

    monkeypatch.setattr(service.running, "cancel", with_newcomer)
    done = await service.whole.take_down(URL, None)
    assert (done["complete"], done["items"]) == (True, 1)
    assert "new" in service.known()


async def test_a_request_that_names_the_file_by_its_uuid_alone_is_ended(service: Service) -> None:
    engine = service.engine
    engine.serve(request("first", items=[64], digest="file"))
    service.note(FILE)
    engine.add(request("runs", items=[64], digest="file", prompt=3, answer=1000))
    engine.step()
    named, other = (
        service.running.begin(
            "/v1/chat/completions", RequestTrace(tokens={"video": 1}, named={one})
        )
        for one in (FILE, OTHER)
    )
    assert named is not None
    assert other is not None
    # Neither has a task that would take its end for that of the test.
    named.task = other.task = None

    def end() -> None:
        engine.play.abort("runs")
        engine.play.drain()
        service.running.end(named, 0)

    asyncio.get_running_loop().call_later(0.05, end)
    done = await service.whole.take_down(URL, None)
    assert (done["complete"], done["requests_ended"], done["items"]) == (True, 1, 1)
    assert not other.taken_down
    assert not engine.outputs
    assert not service.known()


@pytest.mark.parametrize(
    ("uses", "is_ended"),
    [
        ([(DIGEST, OTHER_DIGEST), (OTHER_DIGEST,)], False),
        ([(DIGEST, OTHER_DIGEST)], True),
        ([(DIGEST,), (OTHER_DIGEST,)], True),
        ([(DIGEST, THIRD_DIGEST), (OTHER_DIGEST,)], True),
    ],
    ids=[
        "of the other file",
        "of either file",
        "of both files, which have one uuid",
        "of a file beside a third one, and of the other one, which have one uuid",
    ],
)
async def test_a_request_that_names_an_item_by_its_uuid_is_ended_unless_another_file_became_it(
    service: Service, monkeypatch: pytest.MonkeyPatch, uses: list[tuple[str, ...]], is_ended: bool
) -> None:
    engine, seen = service.engine, service.runtime.seen
    assert seen is not None
    service.note(FILE)
    for digests in uses:
        items = [MediaItem("video", f"http://host/{one}", digest=one) for one in digests]
        seen.note_all(items, [], {OTHER})
    engine.serve(request("first", items=[64], digest="file"))
    engine.add(request("runs", items=[64], digest="other", prompt=3, answer=1000))
    engine.step()
    trace = RequestTrace(tokens={"video": 1}, named={OTHER})
    running = service.running.begin("/v1/chat/completions", trace)
    assert running is not None
    # It has no task that would take its end for that of the test.
    running.task = None
    ending = running.end

    def end() -> None:
        ending()
        engine.play.abort("runs")
        engine.play.drain()
        service.running.end(running, 0)

    monkeypatch.setattr(running, "end", end)
    done = await service.whole.take_down(None, DIGEST)
    assert done["requests_ended"] == is_ended
    # vLLM's own block pool can only be emptied as a whole, once nothing runs.
    assert all(one.startswith("KV blocks") for one in done["left"])
    assert running.taken_down == is_ended
    # The file itself is gone in any case.
    assert {*engine.outputs} == (set() if is_ended else {OTHER})


async def test_an_item_that_comes_again_after_a_takedown_is_not_that_of_the_file_beside_it(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = service.runtime.seen
    assert seen is not None
    kept = service.engine.call_utility_all_async

    async def with_kv_overwritten(_: str, action: str, arguments: Any) -> list[Any]:
        found = await kept(_, action, arguments)
        return [one | {"kv_left": 0} if action == "take_down" else one for one in found]

    monkeypatch.setattr(service.engine, "call_utility_all_async", with_kv_overwritten)
    file, other, third = (
        MediaItem("video", f"http://host/{one}", digest=one)
        for one in (DIGEST, OTHER_DIGEST, THIRD_DIGEST)
    )
    seen.note_all([file, other], [], {FILE, OTHER})
    done = await service.whole.take_down(None, DIGEST)
    assert (done["complete"], done["items"]) == (True, 2)
    seen.note_all([file, third], [], {FILE, "third"})
    trace = RequestTrace(tokens={"video": 1}, named={FILE})
    running = service.running.begin("/v1/chat/completions", trace)
    assert running is not None
    running.task = None
    asyncio.get_running_loop().call_later(0.05, service.running.end, running, 0)
    done = await service.whole.take_down(None, DIGEST)
    assert (done["complete"], done["requests_ended"], done["items"]) == (True, 1, 2)


@pytest.mark.parametrize("first", [DIGEST, unknown_digest(URL)], ids=["read", "not read"])
async def test_an_item_of_a_url_that_served_two_files_is_not_that_of_the_file_always_sent_along(
    service: Service, first: str
) -> None:
    seen = service.runtime.seen
    assert seen is not None
    along = MediaItem("video", "http://host/logo", digest=OTHER_DIGEST)
    for digest in (first, THIRD_DIGEST):
        known = "" if ":" in digest else digest
        seen.note_all([MediaItem("video", URL, digest=known), along], [], {"cam", "logo"})
    trace = RequestTrace(tokens={"video": 1}, named={"cam"})
    running = service.running.begin("/v1/chat/completions", trace)
    assert running is not None
    running.task = None
    asyncio.get_running_loop().call_later(0.05, service.running.end, running, 0)
    done = await service.whole.take_down(URL, None)
    assert (done["requests_ended"], done["items"]) == (1, 2)
    assert running.taken_down


async def test_what_is_told_of_many_requests_with_many_files_is_no_more_than_a_message_holds(
    service: Service,
) -> None:
    seen = service.runtime.seen
    assert seen is not None
    for one in range(820):
        files = [DIGEST, *(blake3(b"%d %d" % (one, n)).hexdigest() for n in range(39))]
        seen.note_all(
            [], [ImageItem("", file) for file in files], [f"item {file}" for file in files]
        )
    hashes = seen.hashes_of([DIGEST])
    assert len(hashes) > 30_000
    (told,) = await service.whole._servers("made_of", digests=[DIGEST], hashes=sorted(hashes))
    assert len(json.dumps(told)) < 8 << 20


async def test_a_file_is_not_forgotten_while_a_request_that_found_it_by_its_uuid_goes_on(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.note(FILE)
    cancel = service.running.cancel

    async def with_newcomer(*asked: Any) -> Any:
        ended = await cancel(*asked)
        trace = RequestTrace(tokens={"video": 1}, named={FILE})
        assert service.running.begin("/v1/chat/completions", trace) is not None
        return ended

    monkeypatch.setattr(service.running, "cancel", with_newcomer)
    done = await service.whole.take_down(URL, None)
    assert (done["complete"], done["left"]) == (False, ["requests that did not end"])
    assert service.known() == {FILE}


async def test_a_store_that_cannot_drop_anything_is_told_and_the_file_stays_known(
    service: Service,
) -> None:
    service.note(FILE)
    scheduler = service.engine.scheduler
    scheduler.connector, scheduler.log_stats = ExampleConnector.__new__(ExampleConnector), False
    assert scheduler.reset_connector_cache(), "vLLM takes it for reset"
    done = await service.whole.take_down(URL, None)
    assert not done["complete"]
    assert "ExampleConnector" in done["left"][0]
    assert service.known()


async def test_a_file_that_nobody_knows_is_told_from_one_that_is_gone(service: Service) -> None:
    for asked in ((URL, None), (None, DIGEST)):
        done = await service.whole.take_down(*asked)
        assert (done["complete"], done["known"]) == (True, False)
        # Nothing was made of it yet.
        service.note()
        assert (await service.whole.take_down(*asked))["known"]
        service.note(FILE)
        assert (await service.whole.take_down(*asked))["known"]


async def test_requests_are_listed_200_at_a_time_the_latest_first(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = service.running.log
    assert log is not None
    # Each request began before the one that ended before it.
    for number in range(300):
        arrival = Arrival(f"0-{number}", "/v1/chat/completions", 1000.0 - number)
        log.add(record_of(arrival, RequestTrace(), 2.0 * number, 200))
    idle = SimpleNamespace(tier=lambda: SimpleNamespace(level=0), loads=lambda _: {})
    monkeypatch.setattr(whole_service, "state_for", lambda _: idle)
    service.whole._config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))
    own = OwnPart(0, None, service.running, log, None)
    rows = (await service.whole.overview())["requests"]
    pages = [rows]
    while len(rows) == 200:
        before = min(row["began"] + row["seconds"] for row in rows)
        rows = await service.whole.requests(before)
        assert rows == await own.requests(before)
        pages.append(rows)
    assert [len(rows) for rows in pages] == [200, 101]
    # The last row of a page is the first one of the next, with others of its time.
    seen = dict.fromkeys(row["id"] for rows in pages for row in rows)
    assert list(seen) == [f"0-{number}" for number in reversed(range(300))]


@pytest.fixture
def pool(service: Service) -> MMExtBlockPool:
    """The plugin's block pool, in which the file comes after a text."""
    engine = kv_harness.Engine(64)
    prompt = [kv_harness.Text(1, 8), kv_harness.Media(FILE, 8)]
    engine.admit(kv_harness.request("first", prompt))
    engine.finish("first")
    service.engine.scheduler.kv_cache_manager.block_pool = engine.pool
    service.note(FILE)
    return engine.pool


@pytest.mark.parametrize("end", ["drop", "release", "unpin"])
async def test_a_pin_of_a_file_ends_with_the_file(
    service: Service, pool: MMExtBlockPool, end: str
) -> None:
    found = await service.whole.media("pin", URL, None)
    assert found is not None
    assert found["items"] == 1
    assert f"media:{DIGEST}" in pool.sessions
    if end == "drop":
        assert (await service.whole.take_down(URL, None))["complete"]
    else:
        await service.whole.media(end, URL, None)
    assert f"media:{DIGEST}" not in pool.sessions
    assert not any(pool.sessions.pinned(piece) for piece in pool.tree)
    pool.check_integrity()


async def test_nothing_is_done_for_a_url_that_nobody_knows(service: Service) -> None:
    for action in ("pin", "unpin", "release"):
        assert await service.whole.media(action, URL, None) is None


async def test_media_are_not_pinned_where_the_engine_keeps_no_kv(service: Service) -> None:
    service.note(FILE)
    for action in ("pin", "unpin", "release"):
        with pytest.raises(NoBlockPoolError):
            await service.whole.media(action, URL, None)
