"""Pixels go to workers with the step that encodes them, and workers have them for that step."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omni_reference import even, features, make_processor, pixels, render, sound, video
from scheduler_harness import PIXELS, Play, make_scheduler, request
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalFlatField,
    MultiModalKwargsItem,
)
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import WorkerWrapperBase

from vllm_mm_ext.adapters.encoder_cache import late_inputs
from vllm_mm_ext.adapters.encoder_cache.late_inputs import applies, without_inputs
from vllm_mm_ext.adapters.models.qwen2_5_omni import Qwen2_5OmniForConditionalGeneration
from vllm_mm_ext.adapters.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm_mm_ext.adapters.models.qwen3_omni import Qwen3OmniMoeForConditionalGeneration
from vllm_mm_ext.adapters.models.qwen3_vl import Qwen3VLForConditionalGeneration

VIDEO = (600, 600, 600)
ONE = PIXELS["dummy"].data.nbytes
_QWEN, _OMNI = (
    "<|vision_start|><|video_pad|><|vision_end|>",
    "<|vision_bos|><|VIDEO|><|vision_eos|>",
)
# Families with M-RoPE, what stands for a video in their prompts, and whether they hear its sound.
ROTARY = (
    ("qwen2_5_vl", Qwen2_5_VLForConditionalGeneration, _QWEN, False),
    ("qwen2_5_omni", Qwen2_5OmniForConditionalGeneration, _OMNI, True),
    ("qwen3_vl", Qwen3VLForConditionalGeneration, _QWEN, False),
    ("qwen3_omni", Qwen3OmniMoeForConditionalGeneration, _QWEN, True),
)


class Worker:
    """A worker that notes what vLLM's V1 runner takes for the encoder in each step."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.model_runner = self
        self.encoded: list[list[str]] = []

    def execute_model(self, output: Any) -> None:
        """Keep new requests, and take the encoder's inputs, as the runner does."""
        for new in output.scheduled_new_reqs:
            self.requests[new.req_id] = SimpleNamespace(mm_features=new.mm_features)
        hashes, inputs, _ = GPUModelRunner._batch_mm_inputs_from_scheduler(self, output)
        for _, item in inputs:
            assert torch.equal(item["dummy"].data, PIXELS["dummy"].data)
        self.encoded.append(hashes)

    @property
    def held(self) -> int:
        """Bytes of inputs that requests have."""
        items = [one.data for held in self.requests.values() for one in held.mm_features]
        return sum(element.data.nbytes for item in items for element in item.values())


def started(**options: Any) -> tuple[Play, WorkerWrapperBase, list[int]]:
    """A scheduler, a worker that is sent its steps as if to another process, and their bytes."""
    play, wrapper, sizes = Play(make_scheduler(**options)), WorkerWrapperBase(), []
    wrapper.worker, wrapper.mm_receiver_cache = Worker(), None
    schedule = play.scheduler.schedule

    def sending(*args: Any) -> Any:
        output = schedule(*args)
        sizes.append(len(sent := pickle.dumps(output)))
        wrapper.execute_model(pickle.loads(sent))
        return output

    play.scheduler.schedule = sending
    return play, wrapper, sizes


def test_each_item_is_sent_once_with_the_step_that_encodes_it() -> None:
    play, wrapper, sizes = started(max_tokens=640, encoder_tokens=640)
    play.add(request("a", items=VIDEO, answer=3))
    play.run()
    steps = [index for index, hashes in enumerate(wrapper.worker.encoded) if hashes]
    assert [wrapper.worker.encoded[index] for index in steps] == [
        [f"a#video{number}"] for number in range(3)
    ]
    assert all(ONE < sizes[index] < 2 * ONE for index in steps)
    assert max(size for index, size in enumerate(sizes) if index not in steps) < ONE


def test_a_follow_up_takes_no_pixels_to_the_worker_and_the_worker_keeps_none() -> None:
    play, wrapper, sizes = started()
    play.add(request("first", items=VIDEO, answer=2, prompt=1, digest="a"))
    play.run()
    # Pickle writes what the three items share once.
    assert sum(sizes) > ONE
    assert not wrapper.worker.held
    sizes.clear()
    play.add(request("second", items=VIDEO, answer=2, prompt=1, digest="a"))
    play.run()
    assert sum(sizes) < ONE
    assert not wrapper.worker.held


def test_what_the_encoder_cache_holds_is_not_sent_though_its_kv_is_gone() -> None:
    play, _, sizes = started()
    play.add(request("first", items=VIDEO, answer=2, prompt=1, digest="a"))
    play.run()
    assert play.scheduler.reset_prefix_cache()
    sizes.clear()
    play.add(request("second", items=VIDEO, answer=2, prompt=1, digest="a"))
    play.run()
    assert sum(sizes) < ONE
    assert len(play.timings["second"].tokens) == 2


def test_a_request_sent_without_pixels_gets_them_when_it_is_preempted_and_all_is_lost() -> None:
    play, wrapper, sizes = started()
    for name, answer in (("first", 1), ("second", 20)):
        play.run()
        play.add(request(name, items=VIDEO, answer=answer, prompt=1, digest="a"))
    sizes.clear()
    play.step()
    assert play.scheduler.requests["second"].num_computed_tokens > sum(VIDEO)
    assert sum(sizes) < ONE
    play.drain()
    play.scheduler.reset_prefix_cache(reset_running_requests=True)
    play.scheduler.reset_encoder_cache()
    wrapper.worker.encoded.clear()
    play.run()
    assert [one for step in wrapper.worker.encoded for one in step] == [
        f"a#video{number}" for number in range(3)
    ]
    assert len(play.timings["second"].tokens) == 20
    assert not wrapper.worker.held


def test_a_failed_step_leaves_no_pixels_at_the_worker() -> None:
    play, wrapper, _ = started()
    execute = wrapper.worker.execute_model

    def failing(output: Any) -> None:
        execute(output)
        raise RuntimeError("out of memory")

    wrapper.worker.execute_model = failing
    play.add(request("a", items=VIDEO))
    with pytest.raises(RuntimeError, match="out of memory"):
        play.step()
    assert wrapper.worker.encoded[0]
    assert not wrapper.worker.held


def test_fields_of_which_positions_are_made_go_with_the_request() -> None:
    flat, batched = MultiModalFlatField(slices=[]), MultiModalBatchedField()
    fields = {
        "pixel_values_videos": MultiModalFieldElem(torch.zeros(64, 1176), flat),
        "many": MultiModalFieldElem([torch.zeros(64, 64)] * 2, batched),
        "video_grid_thw": MultiModalFieldElem(torch.tensor([1, 8, 8]), batched),
        "mask": MultiModalFieldElem(
            torch.ones(1 << 16, dtype=torch.bool), MultiModalBatchedField(keep_on_cpu=True)
        ),
    }
    play = Play(make_scheduler())
    one = request("a", items=(600,))
    one.mm_features[0] = replace(one.mm_features[0], data=MultiModalKwargsItem(fields))
    play.add(one)
    play.step()
    (new,) = play.steps[0].scheduled_new_reqs
    assert list(new.mm_features[0].data) == ["video_grid_thw", "mask"]
    assert list(one.mm_features[0].data) == list(fields)


def test_an_address_in_shared_memory_goes_with_the_request_alone() -> None:
    address = MultiModalKwargsItem({"address": MultiModalFieldElem(4096, MultiModalBatchedField())})
    play = Play(make_scheduler())
    one = request("a", items=(600,))
    one.mm_features[0] = replace(one.mm_features[0], data=address)
    play.add(one)
    play.step()
    (new,) = play.steps[0].scheduled_new_reqs
    assert new.mm_features[0].data is address
    assert not hasattr(play.steps[0], "mm_ext_inputs")


@pytest.mark.parametrize(
    ("family", "model", "prompt", "hears"), ROTARY, ids=[one[0] for one in ROTARY]
)
def test_positions_follow_from_what_goes_with_the_request(
    family: str, model: Any, prompt: str, hears: bool
) -> None:
    processor = make_processor(family, model)
    processor.segment_tokens = 24
    clip = video(pixels(12, 112, 112), even(12, 2.0), sound(6.0) if hears else None)
    result = render(processor, f"see {prompt} what", {"video": [clip]})
    ids, whole = result["prompt_token_ids"], features(result)
    sent = [without_inputs(one) for one in whole]
    assert all(len(mine.data) < len(theirs.data) for mine, theirs in zip(sent, whole, strict=True))
    runs = object.__new__(model)
    torch.nn.Module.__init__(runs)
    runs.config = processor.info.get_hf_config()
    mine, theirs = (runs.get_mrope_input_positions(ids, one) for one in (sent, whole))
    assert torch.equal(mine[0], theirs[0])
    assert mine[1] == theirs[1]


def test_inputs_go_with_the_request_where_the_feature_is_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    play = Play(make_scheduler())
    assert applies(play.scheduler.vllm_config)
    monkeypatch.setattr(late_inputs, "ledger", dict)
    # Of a vLLM whose names have changed nothing may be asked.
    assert not applies(SimpleNamespace())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("distributed_executor_backend", "uni"),
        ("distributed_executor_backend", "ray"),
        ("nnodes", 2),
    ],
)
def test_inputs_go_with_the_request_where_workers_may_not_look_for_them(
    setting: str, value: Any
) -> None:
    def change(config: Any) -> None:
        setattr(config.parallel_config, setting, value)

    play = Play(make_scheduler(change=change))
    assert not applies(play.scheduler.vllm_config)
    play.add(request("a", items=VIDEO))
    play.step()
    (new,) = play.steps[0].scheduled_new_reqs
    assert all(one.data is PIXELS for one in new.mm_features)
    play.run()
    assert not play.not_sent
