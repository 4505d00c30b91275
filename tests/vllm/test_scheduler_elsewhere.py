"""KV and encoder outputs that come from elsewhere, behind vLLM's connector interfaces."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from scheduler_harness import Play, make_scheduler, request
from vllm.config import ECTransferConfig, KVTransferConfig
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)
from vllm.v1.request import Request, RequestStatus

from vllm_mm_ext.adapters.names.scheduler_names import CADENCE_ATTRIBUTES
from vllm_mm_ext.adapters.scheduler.choice import start_warnings

VIDEO = [512] * 6


class Prefilled(KVConnectorBase_V1):  # type: ignore[misc]
    """The scheduler's side of a decode node: another node has computed whole prompts.

    Like vLLM's own: asks what the request's parameters say, and takes the mark away once it loads.
    """

    def get_num_new_matched_tokens(self, request: Request, computed: int) -> tuple[int, bool]:
        params = request.kv_transfer_params or {}
        if not params.get("do_remote_prefill"):
            return params.get("found", 0), False
        return request.num_prompt_tokens - computed, True

    def update_state_after_alloc(self, request: Request, _blocks: Any, external: int) -> None:
        if external and request.kv_transfer_params:
            request.kv_transfer_params["do_remote_prefill"] = False

    def build_connector_meta(self, _output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def wait_for_layer_load(self, layer_name: str) -> None:
        raise NotImplementedError

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def wait_for_save(self) -> None:
        raise NotImplementedError


def decode_node(*, on_failure: str = "fail", **kwargs: Any) -> Play:
    transfer = KVTransferConfig(
        kv_load_failure_policy=on_failure,
        kv_connector="Prefilled",
        kv_connector_module_path=__name__,
        kv_role="kv_consumer",
    )
    return Play(make_scheduler(kv_transfer=transfer, **kwargs))


def prefilled(name: str, **params: Any) -> Request:
    one = request(name, items=VIDEO, answer=4)
    one.kv_transfer_params = params
    return one


def encoded(play: Play) -> set[str]:
    return {name for output in play.steps for name in output.scheduled_encoder_inputs}


def test_a_request_prefilled_on_another_node_waits_for_no_encoder_work() -> None:
    play = decode_node(slots=8)
    play.add(*[prefilled(f"here{number}") for number in range(6)])
    play.step()
    play.add(prefilled("there", do_remote_prefill=True))
    play.step()
    there = play.scheduler.requests["there"]
    assert there.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    play.scheduler.finished_recving_kv_req_ids.add("there")
    play.step()
    assert play.timings["there"].tokens
    play.run()
    assert encoded(play) == {f"here{number}" for number in range(6)}
    assert all(len(one.tokens) == 4 for one in play.timings.values())


def test_what_is_prefilled_elsewhere_may_be_more_than_the_encoder_cache_holds_here() -> None:
    play = decode_node()
    one = request("there", items=[3000], sound=1000, answer=4)
    one.kv_transfer_params = {"do_remote_prefill": True}
    play.add(one)
    play.step()
    play.scheduler.finished_recving_kv_req_ids.add("there")
    play.run(most=20)
    assert not encoded(play)
    assert len(play.timings["there"].tokens) == 4


@pytest.mark.parametrize("lost", ["in the transfer", "after a preemption"])
def test_what_is_more_than_the_encoder_cache_holds_ends_where_it_must_be_computed_here(
    lost: str,
) -> None:
    play = decode_node(on_failure="recompute")
    scheduler = play.scheduler
    one = request("there", items=[3000], sound=1000, answer=400)
    one.kv_transfer_params = {"do_remote_prefill": True}
    play.add(one)
    play.step()
    if lost == "in the transfer":
        # What vLLM does with a load that brought nothing.
        one.num_computed_tokens = 0
        scheduler.failed_recving_kv_req_ids.add("there")
    scheduler.finished_recving_kv_req_ids.add("there")
    if lost == "after a preemption":
        while not play.timings["there"].tokens:
            play.step()
        scheduler.running.remove(one)
        scheduler._preempt_request(one, 0.0)
        assert scheduler.reset_prefix_cache()
    # It keeps no other request's encoder work waiting.
    play.add(request("next", items=[512], answer=4))
    play.run(most=50)
    assert one.status == RequestStatus.FINISHED_ERROR
    assert encoded(play) == {"next"}
    assert len(play.timings["next"].tokens) == 4


def test_where_the_transfer_fails_the_request_is_computed_here() -> None:
    play = decode_node()
    play.add(prefilled("there", do_remote_prefill=True))
    play.step()
    there = play.scheduler.requests["there"]
    # What vLLM does with a load that brought nothing.
    there.num_computed_tokens = 0
    play.scheduler.failed_recving_kv_req_ids.add("there")
    play.scheduler.finished_recving_kv_req_ids.add("there")
    play.run()
    assert encoded(play) == {"there"}
    assert len(play.timings["there"].tokens) == 4


# The first item begins at token 32, in the middle of which a load may fail.
@pytest.mark.parametrize("lost", [range(1, 9), range(10, 20)], ids=["from the start", "in an item"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("second_runner", [False, True])
@pytest.mark.parametrize("answer", [1, 4])
def test_items_whose_kv_could_not_be_loaded_are_encoded_and_their_inputs_are_there(
    answer: int, second_runner: bool, depth: int, lost: range
) -> None:
    """vLLM's scheduler sends no inputs of what is in KV, and only once."""
    play = decode_node(on_failure="recompute", encoder_tokens=8192, asynchronous=depth > 1)
    play = Play(play.scheduler, depth=depth)
    play.scheduler.use_v2_model_runner = second_runner
    one = request("found", items=VIDEO, answer=answer)
    one.kv_transfer_params = {"found": 32 + 6 * 512}
    play.add(one)
    play.lost = set(lost)
    play.run(most=200)
    assert encoded(play) == {"found"}
    assert not play.not_sent
    assert len(play.timings["found"].tokens) == answer


@pytest.mark.parametrize("depth", [1, 2])
def test_a_failed_load_leaves_other_requests_decoding_and_within_their_grammar(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM lets a prompt have any token: it would end the request whose grammar forbids it."""
    play = decode_node(on_failure="recompute", encoder_tokens=8192, asynchronous=depth > 1)
    play = Play(play.scheduler, depth=depth)
    play.add(request("decodes", answer=40))
    for _ in range(4):
        play.step()
    decodes = play.scheduler.requests["decodes"]
    one = request("found", items=VIDEO)
    one.kv_transfer_params = {"found": 32 + 6 * 512}
    play.add(one)
    play.step()
    (blocks,) = play.scheduler.kv_cache_manager.get_block_ids("found")
    play.lost = set(blocks[10:20])
    while play.lost:
        output = play.step()
    assert not decodes.is_prefill_chunk
    # What may be sampled in the step that was scheduled before the failure was known.
    output.has_structured_output_requests = True
    with monkeypatch.context() as played:
        played.setattr(decodes, "structured_output_request", Any)
        played.setattr(play.scheduler.structured_output_manager, "grammar_bitmask", _no_rows)
        found = play.scheduler.get_grammar_bitmask(output)
    assert found is not None
    assert found.structured_output_request_ids == ["decodes"]
    play.run(most=200)
    assert len(play.timings["decodes"].tokens) == 40
    assert len(play.timings["found"].tokens) == 4


def _no_rows(*_: Any) -> None:
    """Instead of xgrammar's."""


class Unmarked(Prefilled):
    """A connector that has nothing, and knows no mark of another node."""

    def get_num_new_matched_tokens(self, _request: Request, _computed: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, _request: Request, _blocks: Any, _external: int) -> None:
        """Nothing to take away."""


def test_who_says_that_another_node_has_its_kv_keeps_nobody_out_where_none_has() -> None:
    """Its own cached prefix ends where its first item begins: without the item it gets nowhere."""
    transfer = KVTransferConfig(
        kv_connector="Unmarked", kv_connector_module_path=__name__, kv_role="kv_both"
    )
    settings = {"aging_s": 2.0}
    play = Play(make_scheduler(kv_transfer=transfer, encoder_tokens=4096, settings=settings))
    play.add(request("first", items=[512], prompt=7))
    play.run()
    marked = request("marked", items=[512], prompt=7, digest="other")
    marked.kv_transfer_params = {"do_remote_prefill": True}
    play.add(marked)
    for _ in range(5):
        play.step()
    play.now += 3.0
    play.step()
    play.add(*[request(f"later{number}", text=40) for number in range(3)])
    play.run(most=400)
    assert all(len(timing.tokens) == 4 for timing in play.timings.values())


def test_items_whose_kv_a_connector_finds_are_not_encoded() -> None:
    """It is found when vLLM lets the request in, which is after the plan was made."""
    play = decode_node(encoder_tokens=8192)
    play.add(prefilled("half", found=32 + 3 * 512))
    play.run()
    indices = [
        index
        for output in play.steps
        for one in output.scheduled_encoder_inputs.values()
        for index in one
    ]
    assert indices == [3, 4, 5]
    assert len(play.timings["half"].tokens) == 4


def test_at_start_up_it_is_told_whom_a_connector_makes_wait(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "vllm.mm_ext"):
        decode_node()
    assert "do_remote_prefill" in caplog.text


@pytest.fixture
def encoder_node(tmp_path: Path) -> tuple[Play, Path]:
    transfer = ECTransferConfig(
        ec_connector="ECExampleConnector",
        ec_role="ec_consumer",
        ec_connector_extra_config={"shared_storage_path": str(tmp_path)},
    )
    settings = {"target_itl_ms": 20.0}
    return (
        Play(make_scheduler(ec_transfer=transfer, encoder_tokens=8192, settings=settings)),
        tmp_path,
    )


def there(folder: Path, *digests: str) -> None:
    for digest in digests:
        (folder / digest).mkdir()
        (folder / digest / "encoder_cache.safetensors").touch()


@pytest.mark.parametrize("elsewhere", [(0,), (1,), (0, 3), (2, 5), (1, 4, 5), (3, 4, 5)])
def test_what_another_node_has_encoded_pays_for_nothing_else(
    encoder_node: tuple[Play, Path], elsewhere: tuple[int, ...]
) -> None:
    play, folder = encoder_node
    there(folder, *[f"video#video{index}" for index in elsewhere])
    play.add(request("decodes", answer=200))
    play.step()
    play.add(request("video", items=VIDEO, answer=4))
    while not play.timings["video"].tokens:
        output = play.step()
        spent = sum(VIDEO[index] for index in output.scheduled_encoder_inputs.get("video", ()))
        assert spent <= play.scheduler._plan.encoder_tokens
    found = [i for output in play.steps for i in output.scheduled_encoder_inputs.get("video", ())]
    assert found == [index for index in range(6) if index not in elsewhere]
    # An item takes more than five times as long as a step has; later steps make up for it.
    assert len(play.steps) >= 4 * (len(found) - 1)


class Prefetching(ECConnectorBase):  # type: ignore[misc]
    """The scheduler's side of a connector that fetches encoder outputs when asked for them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: set[str] = set()
        self.arrived: set[str] = set()

    def has_cache_item(self, identifier: str) -> bool:
        return identifier in self.arrived

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        needed = {
            feature.identifier
            for feature in request.mm_features
            if feature.mm_position.offset + feature.mm_position.length > num_computed_tokens
        }
        self.asked |= needed
        return needed <= self.arrived

    def update_state_after_alloc(self, _request: Request, _index: int) -> None:
        """Nothing to keep."""

    def build_connector_meta(self, _output: Any) -> ECConnectorMetadata:
        return ECConnectorMetadata()

    def start_load_caches(self, encoder_cache: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def save_caches(self, encoder_cache: Any, mm_hash: str, **kwargs: Any) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_encoder_outputs_that_a_connector_prefetched_are_used_in_the_next_step(steps: int) -> None:
    transfer = ECTransferConfig(
        ec_connector="Prefetching", ec_connector_module_path=__name__, ec_role="ec_consumer"
    )
    play = Play(make_scheduler(ec_transfer=transfer, encoder_tokens=8192))
    play.add(request("decodes", answer=200))
    play.step()
    play.add(request("video", items=VIDEO, answer=4))
    connector = play.scheduler.ec_connector
    while not connector.asked:
        play.step()
    for _ in range(steps):
        assert "video" not in play.step().num_scheduled_tokens
    connector.arrived |= connector.asked
    assert "video" in play.step().num_scheduled_tokens
    assert not encoded(play)


class LookingUp(Prefilled):
    """A connector that needs some time to tell how much it has."""

    found: int | None = None

    def get_num_new_matched_tokens(
        self, _request: Request, computed: int
    ) -> tuple[int | None, bool]:
        return (None if self.found is None else max(0, self.found - computed)), False


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_kv_that_a_connector_has_looked_up_is_used_in_the_next_step(steps: int) -> None:
    transfer = KVTransferConfig(
        kv_connector="LookingUp", kv_connector_module_path=__name__, kv_role="kv_consumer"
    )
    play = Play(make_scheduler(kv_transfer=transfer, encoder_tokens=8192))
    connector = play.scheduler.connector
    connector.found = 0
    play.add(request("decodes", answer=200))
    play.step()
    connector.found = None
    play.add(request("video", items=VIDEO, answer=4))
    for _ in range(steps):
        assert "video" not in play.step().num_scheduled_tokens
    connector.found = 32 + sum(VIDEO)
    assert "video" in play.step().num_scheduled_tokens


def every_fourth_step(config: Any) -> None:
    config.scheduler_config.prefill_schedule_interval = 4


def test_prompts_that_vllm_holds_back_are_not_taken_for_refused() -> None:
    """vLLM 0.33 begins prefill in every so many steps, 0.32 does not on an engine by itself."""
    play = Play(make_scheduler(change=every_fourth_step, encoder_tokens=8192))
    acts = hasattr(play.scheduler, CADENCE_ATTRIBUTES[0])
    warned = start_warnings(play.scheduler)
    assert any("--prefill-schedule-interval" in warning for warning in warned) == acts
    play.add(request("decodes", answer=200))
    play.step()
    play.add(*[request(f"video{number}", items=[512] * 2, answer=4) for number in range(3)])
    for _ in range(40):
        play.step()
        assert not play.scheduler._admission._refusals
    assert all(play.timings[f"video{number}"].ended is not None for number in range(3))
