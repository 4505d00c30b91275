"""What is taken down is in no cache of an engine any more; everything else still is."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from blake3 import blake3
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_harness import BLOCK, Engine, Media, Text, request
from vllm.distributed.ec_transfer.ec_connector.example_connector import ECExampleConnector
from vllm.distributed.ec_transfer.ec_connector.mooncake_ec_connector import ECMooncakeConnector
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector
from vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector import LMCacheConnectorV1
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.distributed.kv_transfer.kv_connector.v1.simple_cpu_offload_connector import (
    SimpleCPUOffloadConnector,
)
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.entrypoints.speech_to_text.transcription.serving import OpenAIServingTranscription
from vllm.entrypoints.speech_to_text.translation.serving import OpenAIServingTranslation
from vllm.inputs.engine import mm_enc_dec_input, mm_input
from vllm.multimodal.cache import (
    LruKeyReplicatedReceiverCache,
    LruKeyReplicatedSenderCache,
    MultiModalProcessorOnlyCache,
    ShmObjectStoreSenderCache,
)
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.renderers.hf import HfRenderer
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_mm_ext.adapters.encoder_cache.cuda_connector import CudaECConnector
from vllm_mm_ext.adapters.encoder_cache.ec_connector import MMExtECConnector, NoHostTier
from vllm_mm_ext.adapters.encoder_cache.shared_store import SharedStoreConnector
from vllm_mm_ext.adapters.encoder_cache.transport_connector import TransportConnector
from vllm_mm_ext.adapters.runtime import attach_runtime, detach_runtime
from vllm_mm_ext.adapters.serving import answers
from vllm_mm_ext.adapters.serving.middleware import TraceMiddleware
from vllm_mm_ext.adapters.sight import worker_part
from vllm_mm_ext.adapters.sight.api_server_sight import ApiServerSight
from vllm_mm_ext.adapters.sight.connector_stores import stores_left
from vllm_mm_ext.adapters.sight.processor_cache import drop_inputs
from vllm_mm_ext.config.kv_settings import KVSettings
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.plugin import register
from vllm_mm_ext.request.context import RequestContext, current_request, enter_request
from vllm_mm_ext.sight.request_log import RequestLog
from vllm_mm_ext.sight.running_requests import RunningRequests

PROMPTS = st.lists(
    st.lists(
        st.one_of(
            st.builds(Media, st.sampled_from("abcd"), st.integers(1, 14)),
            st.builds(Text, st.integers(0, 2), st.integers(1, 9)),
        ),
        min_size=1,
        max_size=6,
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60)
@given(prompts=PROMPTS, gone=st.sets(st.sampled_from("abcd"), min_size=1), small=st.booleans())
def test_no_kv_that_depends_on_an_item_is_found_and_all_other_kv_is(prompts, gone, small) -> None:
    # With a small quota most items have been given up, and are still cached.
    share = 0.02 if small else 1.0
    engine = Engine(400, KVSettings(max_visual_cache_share=share, min_items=0))
    for number, parts in enumerate(prompts):
        engine.serve(request(f"first {number}", parts))
    found = engine.pool.take_down(lambda name: name in gone)
    engine.pool.check_integrity()
    for block in found:
        assert engine.pool.blocks[block].block_hash is None
    for number, parts in enumerate(prompts):
        new = request(f"second {number}", parts)
        _, hit, _ = engine.manager.get_computed_blocks(new)
        starts = [f.mm_position.offset for f in new.mm_features if f.identifier in gone]
        # vLLM always computes the last token.
        most = (new.num_tokens - 1) // BLOCK * BLOCK
        assert hit == (min(most, starts[0] // BLOCK * BLOCK) if starts else most)


def test_an_item_that_a_request_uses_keeps_its_blocks_but_is_not_found() -> None:
    engine = Engine(100)
    engine.admit(request("runs", [Media("a", 20), Text(1, 3)]))
    found = engine.pool.take_down(lambda name: name == "a")
    assert found
    assert all(engine.pool.blocks[block].ref_cnt for block in found)
    assert engine.manager.get_computed_blocks(request("new", [Media("a", 20)]))[1] == 0
    engine.finish("runs")
    engine.pool.check_integrity()


def test_the_end_of_a_prompt_within_a_block_goes_with_its_item_also_where_it_was_moved() -> None:
    # vLLM caches ends of prompts for models that have Mamba layers as well.
    engine = Engine(100, window=64, hash_block=BLOCK // 2)
    full = engine.manager.coordinator.single_type_managers[0]
    for number in range(2):
        parts = [Text(number, 2 * BLOCK + 1), Media("a", 2)]
        engine.admit(one := request(str(number), parts, hash_block=BLOCK // 2))
        full._cache_partial_tail_block(one, one.num_tokens)
        block = full.req_to_blocks[one.request_id][2]
        # All but the last token.
        assert block.block_hash_num_tokens == 2 * BLOCK + 2
        if number:
            (copy,) = engine.pool.get_new_blocks(1)
            engine.pool.move_block_hashes(block, copy)
            block = copy
        assert engine.pool.take_down(lambda name: name == "a") == {block.block_id}
        assert block.block_hash is None
    engine.pool.check_integrity()


def item(value: float) -> MultiModalKwargsItem:
    data = torch.full((64, 8), value)
    element = MultiModalFieldElem(data=data, field=MultiModalBatchedField())
    return MultiModalKwargsItem({"pixels": element})


def model_config() -> Any:
    sizes = SimpleNamespace(mm_processor_cache_gb=0.01, mm_shm_cache_max_object_size_mb=1)
    return SimpleNamespace(get_multimodal_config=lambda: sizes)


def test_inputs_in_an_engine_are_gone_but_for_a_request_that_uses_them() -> None:
    cache, gone, kept = LruKeyReplicatedReceiverCache(model_config()), item(1.0), item(2.0)
    cache.get_and_update_item(gone, "gone")
    cache.get_and_update_item(kept, "kept")
    assert drop_inputs(cache, ["gone", "unknown"]) == 1
    assert torch.equal(gone["pixels"].data, item(1.0)["pixels"].data)
    assert torch.equal(
        cache.get_and_update_item(None, "kept")["pixels"].data, item(2.0)["pixels"].data
    )
    with pytest.raises(Exception, match="gone"):
        cache.get_and_update_item(None, "gone")


@pytest.mark.parametrize("kind", [LruKeyReplicatedSenderCache, MultiModalProcessorOnlyCache])
def test_an_api_server_sends_a_dropped_item_anew(kind: Any) -> None:
    cache = kind(model_config())
    cache.get_and_update_item((item(1.0), []), "gone")
    cache.get_and_update_item((item(2.0), []), "kept")
    assert drop_inputs(cache, ["gone"]) == 1
    assert cache.is_cached(["gone", "kept"]) == [False, True]


def test_an_item_in_shared_memory_is_overwritten_and_its_place_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm.envs.VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME", "mm_ext_test_take_down")
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=1), model_config=model_config()
    )
    cache = ShmObjectStoreSenderCache(config)
    try:
        storage = cache._shm_cache
        cache.get_and_update_item((item(1.0), []), "gone")
        cache.get_and_update_item((item(2.0), []), "kept")
        address, _ = storage.key_index["gone"]
        assert drop_inputs(cache, ["gone"]) == 1
        with storage.ring_buffer.access_buf(address) as (view, _):
            assert not any(view[storage.flag_bytes :])
            # The reader of the request that brought it is done.
            view[: storage.flag_bytes] = storage.ring_buffer.int2byte(1)
        assert cache.is_cached(["gone", "kept"]) == [False, True]
        assert torch.equal(
            storage.get(*storage.key_index["kept"])["pixels"].data, item(2.0)["pixels"].data
        )
        storage.free_unused()
        cache.get_and_update_item((item(3.0), []), "gone")
        assert cache.is_cached_item("gone")
    finally:
        cache.close()


def runner_of(**parts: Any) -> SimpleNamespace:
    """A model runner, as far as takedowns know it."""
    config = SimpleNamespace(has_mamba_layers=parts.pop("mamba", False))
    return SimpleNamespace(kv_cache_config=config, device=torch.device("cpu"), **parts)


def test_a_worker_overwrites_outputs_and_blocks() -> None:
    zeroed: list[int] = []
    with torch.inference_mode():
        gone, kept = torch.ones(4, 8), torch.ones(4, 8)
    runner = runner_of(encoder_cache={"gone": gone, "kept": kept}, _zero_block_ids=zeroed.extend)
    worker = SimpleNamespace(model_runner=runner)
    assert worker_part.take_down(worker, ["gone", "unknown"], [3, 4]) == (1, True)
    assert not gone.any()
    assert kept.all()
    assert list(runner.encoder_cache) == ["kept"]
    assert zeroed == [3, 4]
    # vLLM's second runner.
    outputs = SimpleNamespace(encoder_outputs={"gone": torch.ones(2)})
    zeroer = SimpleNamespace(zero_block_ids=zeroed.extend)
    second = runner_of(encoder_cache=outputs, kv_block_zeroer=zeroer)
    assert worker_part.take_down(SimpleNamespace(model_runner=second), ["gone"], [5]) == (1, True)
    assert zeroed == [3, 4, 5]
    # A model without an encoder.
    none = runner_of(encoder_cache=None, kv_block_zeroer=zeroer)
    assert worker_part.take_down(SimpleNamespace(model_runner=none), ["gone"], []) == (0, True)


def made(kind: Any, **parts: Any) -> Any:
    """A connector of vLLM's without its surroundings."""
    one = kind.__new__(kind)
    vars(one).update(parts)
    return one


def offloading(*tiers: Any) -> Any:
    """vLLM's offloading to the host, with tiers behind that."""
    manager = made(TieringOffloadingManager, secondary_tiers=[*tiers])
    scheduler = made(OffloadingConnectorScheduler, manager=manager)
    return made(OffloadingConnector, connector_scheduler=scheduler)


@pytest.mark.parametrize(
    ("kv", "names"),
    [
        (None, []),
        (made(NixlPullConnector), []),
        (made(SimpleCPUOffloadConnector, connector_scheduler=None), []),
        (offloading(), []),
        (offloading(made(FileSystemTierManager)), ["FileSystemTierManager"]),
        (made(LMCacheConnectorV1), ["LMCacheConnectorV1"]),
        (
            made(MultiConnector, _connectors=[made(NixlPullConnector), made(ExampleConnector)]),
            ["ExampleConnector"],
        ),
    ],
)
def test_stores_of_kv_that_drop_nothing_are_told(kv: Any, names: list[str]) -> None:
    scheduler = SimpleNamespace(connector=kv, ec_connector=None, encoder_cache_manager=None)
    assert stores_left(scheduler) == names


@pytest.mark.parametrize(
    ("outputs", "hosts", "names"),
    [
        (None, False, []),
        (made(ECExampleConnector), False, ["ECExampleConnector"]),
        (made(NoHostTier), False, []),
        (object.__new__(MMExtECConnector), True, []),
        (made(CudaECConnector), True, []),
        (
            object.__new__(TransportConnector),
            True,
            ["ECMooncakeConnector"],
        ),
    ],
)
def test_stores_of_encoder_outputs_that_drop_nothing_are_told(
    outputs: Any, hosts: bool, names: list[str]
) -> None:
    if isinstance(outputs, TransportConnector):
        outputs.transport = made(ECMooncakeConnector)
    manager = SimpleNamespace(host=outputs if hosts else None)
    scheduler = SimpleNamespace(connector=None, ec_connector=outputs, encoder_cache_manager=manager)
    assert stores_left(scheduler) == names
    if isinstance(outputs, TransportConnector):
        outputs.transport = made(SharedStoreConnector)
        assert stores_left(scheduler) == []


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (OpenAIServingTranscription, "create_transcription"),
        (OpenAIServingTranslation, "create_translation"),
    ],
)
async def test_a_file_that_comes_to_be_transcribed_is_known_by_its_digest(
    kind: type[Any], method: str
) -> None:
    register()

    class Serving(kind):  # type: ignore[misc]
        def __init__(self) -> None:
            """No engine."""

        async def _create_speech_to_text(self, audio_data: bytes, **_: Any) -> bytes:
            return audio_data

    context = enter_request(RequestContext())
    context.trace.watched = True
    asked = SimpleNamespace(response_format="json", model_extra=None)
    assert await getattr(Serving(), method)(b"sound", asked, None) == b"sound"
    (item,) = context.items
    assert (item.modality, item.known_digest) == ("audio", blake3(b"sound").hexdigest())
    assert context.trace.media == [item]


class EncoderDecoderRenderer(HfRenderer):
    """vLLM's renderer of an encoder-decoder, but for its processor."""

    def __init__(self) -> None:
        """No model."""

    async def _process_singleton_async(self, *_: Any, **__: Any) -> Any:
        sound = mm_input(
            prompt_token_ids=[0],
            mm_kwargs=MultiModalKwargsItems({}),
            mm_hashes={"audio": ["hash of the sound"]},
            mm_placeholders={"audio": [PlaceholderRange(offset=0, length=1500)]},
        )
        return mm_enc_dec_input(sound, [1, 2, 3])

    def get_dec_start_token_id(self) -> int:
        return 1

    def _get_skip_decoder_start_token(self) -> bool:
        return False


async def test_what_the_encoder_of_an_encoder_decoder_got_is_known_by_its_file() -> None:
    register()
    renderer = EncoderDecoderRenderer()
    config = MMExtConfig.from_additional_config({"mm_ext": {"sight": {"page": True}}})
    runtime = attach_runtime(config, ModelTraits(), renderer)
    try:
        context = enter_request(RequestContext(renderer=renderer))
        context.trace.watched = True
        await answers.begin_with_file(b"sound")
        prompt = {"encoder_prompt": {"prompt_token_ids": [0]}, "decoder_prompt": None}
        made = await renderer.process_for_engine_async(prompt, 0.0)
        assert runtime.seen is not None
        digest = blake3(b"sound").hexdigest()
        assert runtime.seen.hashes_of([digest]) == {"hash of the sound"}
        followed = answers.observer("r", made)
        assert followed is not None
        assert followed._trace.items
        assert followed._trace.items is context.trace.prompts[0].items
    finally:
        detach_runtime(renderer)


class OnDevice:
    """The part of vLLM's model runners that overwrites blocks of a GPU, by its own code.

    vLLM makes what does so for few models.
    """

    device = torch.device("cuda")
    kv_cache_config = SimpleNamespace(has_mamba_layers=False)

    def __init__(self, zeroed: list[int]) -> None:
        self.zeroed = zeroed


class FirstRunner(OnDevice):
    _zero_block_ids = GPUModelRunner._zero_block_ids

    def _init_kv_zero_meta(self) -> None:
        self._kv_block_zeroer = SimpleNamespace(zero_block_ids=self.zeroed.extend)


class SecondRunner(OnDevice):
    kv_block_zeroer: Any = None

    def _init_kv_zero_meta(self) -> None:
        assert self.kv_block_zeroer is None, "made twice"
        self.kv_block_zeroer = SimpleNamespace(zero_block_ids=self.zeroed.extend)


@pytest.mark.parametrize("runner", [FirstRunner, SecondRunner])
def test_blocks_of_a_gpu_are_overwritten_also_where_vllm_never_does(runner: Any) -> None:
    zeroed: list[int] = []
    one = runner(zeroed)
    assert worker_part.zero_blocks(one, [3])
    assert worker_part.zero_blocks(one, [4, 5])
    assert zeroed == [3, 4, 5]


def test_blocks_that_nothing_overwrites_are_told() -> None:
    assert not worker_part.zero_blocks(runner_of(), [3])
    assert not worker_part.zero_blocks(runner_of(_zero_block_ids=lambda _: None, mamba=True), [3])
    assert worker_part.zero_blocks(runner_of(), [])


class Serving:
    """vLLM's chat route with the plugin's middleware; its work never ends by itself."""

    def __init__(self, *, streams: bool) -> None:
        self.running = RunningRequests()
        self.running.follow(RequestLog(10), server=0)
        self.at_work = asyncio.Event()
        self.ended = False
        self.app = app = FastAPI()
        sight = ApiServerSight(dict)
        app.add_middleware(TraceMiddleware, sight=sight, running=self.running)

        async def work() -> None:
            self.at_work.set()
            try:
                await asyncio.Event().wait()
            finally:
                try:
                    # What is cancelled needs some time to end.
                    await asyncio.sleep(0.05)
                finally:
                    self.ended = True

        @app.post("/v1/chat/completions")
        @with_cancellation  # type: ignore[untyped-decorator]
        async def chat(body: dict[str, Any], raw_request: Request) -> Any:
            del raw_request  # Is for the decorator.
            answers.begin(None, None)
            context = current_request()
            assert context is not None
            context.claim("video", body["url"])
            if not streams:
                await work()

            async def events() -> Any:
                yield "data: 1"
                await work()

            return StreamingResponse(events())

        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://server", timeout=30
        )

    async def asked(self) -> asyncio.Task[httpx.Response]:
        asking = asyncio.create_task(
            self.client.post("/v1/chat/completions", json={"url": "http://h/v"})
        )
        await self.at_work.wait()
        return asking


async def test_a_request_in_a_task_of_vllms_has_ended_when_the_takedown_goes_on() -> None:
    serving = Serving(streams=False)
    asking = await serving.asked()
    assert (await serving.running.cancel([], ["http://h/v"], [], timeout_s=5.0))[:2] == (1, 0)
    assert serving.ended
    answer = await asking
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, 410)


async def test_a_request_whose_client_went_away_is_logged_without_a_status() -> None:
    serving = Serving(streams=False)
    asked = [{"type": "http.request", "body": b'{"url": "http://h/v"}'}]

    async def receive() -> dict[str, Any]:
        if asked:
            return asked.pop()
        await serving.at_work.wait()
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        """Nobody is there."""

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
    await serving.app(scope | {"query_string": b""}, receive, send)
    while serving.running.log is None or not len(serving.running.log):
        await asyncio.sleep(0.01)
    assert [row["status"] for row in serving.running.log.summaries()] == [0]


async def test_an_answer_that_has_begun_ends() -> None:
    serving = Serving(streams=True)
    asking = await serving.asked()
    assert (await serving.running.cancel([], ["http://h/v"], [], timeout_s=5.0))[:2] == (1, 0)
    assert serving.ended
    # A real server cuts the connection, as the answer has no end.
    with pytest.raises(AssertionError):
        await asking
