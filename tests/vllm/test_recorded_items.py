"""Items of videos that another server has decoded, and the same items decoded here."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from omni_reference import (
    even,
    features,
    make_processor,
    new_cache,
    pixels,
    render,
    sound,
    video,
)
from PIL import Image
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
)
from vllm.multimodal.media import MediaWithBytes

from vllm_mm_ext.adapters.encoder_cache.bare_items import BARE, is_bare
from vllm_mm_ext.adapters.encoder_cache.mm_features import feature_cost
from vllm_mm_ext.adapters.models.composer import MMExtComposerForConditionalGeneration
from vllm_mm_ext.adapters.models.internvl import InternVLForConditionalGeneration
from vllm_mm_ext.adapters.models.llava_onevision import LlavaOnevisionForConditionalGeneration
from vllm_mm_ext.adapters.models.qwen2_5_omni import Qwen2_5OmniForConditionalGeneration
from vllm_mm_ext.adapters.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm_mm_ext.adapters.models.qwen3_omni import Qwen3OmniMoeForConditionalGeneration
from vllm_mm_ext.adapters.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.media.recorded import (
    DELIVERED,
    Delivered,
    RecordedFrames,
    RecordError,
    limits_key,
    unpack,
)
from vllm_mm_ext.media.types import (
    DecodeRequest,
    FrameSelection,
    MediaInfo,
    SamplingSpec,
    VideoStream,
)

FRAMES = 12
REQUEST = DecodeRequest(sampling=SamplingSpec(), audio="optional")


class Family(NamedTuple):
    model: Any
    prompt: str
    hears: bool = False
    reduction: Reduction = NO_REDUCTION


_VISION = "<|vision_start|>{}<|vision_end|>"
FAMILIES = {
    "qwen2_5_omni": Family(
        Qwen2_5OmniForConditionalGeneration, "<|vision_bos|><|VIDEO|><|vision_eos|>", True
    ),
    "qwen3_omni": Family(
        Qwen3OmniMoeForConditionalGeneration, _VISION.format("<|video_pad|>"), True
    ),
    "qwen2_5_vl": Family(
        Qwen2_5_VLForConditionalGeneration,
        _VISION.format("<|video_pad|>"),
        reduction=Reduction(static="prune", keep=0.5),
    ),
    "qwen3_vl": Family(Qwen3VLForConditionalGeneration, _VISION.format("<|video_pad|>")),
    "internvl": Family(InternVLForConditionalGeneration, "<video>"),
    "llava_onevision": Family(LlavaOnevisionForConditionalGeneration, "<video>"),
    "composer": Family(MMExtComposerForConditionalGeneration, "<|video_pad|>", True),
}


@cache
def processor_of(name: str) -> Any:
    processor = make_processor(name, FAMILIES[name].model)
    processor.segment_tokens = 24
    return processor


def decoded(family: Family, seed: int = 0) -> MediaWithBytes:
    """A video as the front-end delivers it."""
    track = sound(6.0) if family.hears else None
    frames = pixels(FRAMES, 112, 112, seed)
    made = video(frames, even(FRAMES, 2.0), track, f"clip {seed}", family.reduction)
    times = np.array(even(FRAMES, 2.0))
    stream = VideoStream(0, "h264", 112, 112, 0, 2.0, False, FRAMES, 6.0, "yuv420p")
    selection = FrameSelection("uniform", np.arange(FRAMES), times, step=0.5)
    info = MediaInfo("mp4", 1, 6.0, stream, ())
    delivered = Delivered(info, selection, "", limits_key(REQUEST.limits))
    made.media[0].memo[DELIVERED] = delivered
    return made


def recorded(made: MediaWithBytes, record: bytes) -> MediaWithBytes:
    """The video as a server takes it that has the record and nothing else."""
    frames, metadata = made.media
    bare = RecordedFrames.of_record(unpack(record, REQUEST), "x", frames.reduction)
    bare.digest = frames.digest
    return MediaWithBytes((bare, metadata), made.original_bytes)


def rendered(
    name: str, videos: list[Any], cached: Any = None, more: Any = (), **kwargs: Any
) -> Any:
    prompt = " and ".join([FAMILIES[name].prompt] * len(videos))
    data = {"video": videos}
    for token, modality, item in more:
        prompt, data[modality] = f"{prompt} {token}", [item]
    return render(processor_of(name), f"see {prompt} what", data, cache=cached, **kwargs)


def record_of(name: str, made: MediaWithBytes, **kwargs: Any) -> tuple[Any, bytes]:
    """What a server makes of a video that it decodes, and the record that it writes."""
    processor, found = processor_of(name), []
    processor.recorder = lambda _, data: found.append(data)
    try:
        result = rendered(name, [made], **kwargs)
    finally:
        processor.recorder = None
    (record,) = found
    return result, record


def prompt_of(result: Any) -> Any:
    """Tokens, and what stands where in them."""
    places = {kind: list(map(repr, found)) for kind, found in result["mm_placeholders"].items()}
    return result["prompt_token_ids"], result["mm_hashes"], places


def equal(one: Any, other: Any) -> bool:
    return bool(torch.equal(torch.as_tensor(one), torch.as_tensor(other)))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_recorded_video_is_the_same_prompt_and_the_same_items_without_pixels(name: str) -> None:
    made = decoded(FAMILIES[name])
    whole, record = record_of(name, made)
    bare = rendered(name, [recorded(made, record)])
    assert prompt_of(bare) == prompt_of(whole)
    assert len(bare["mm_hashes"]["video"]) > (name != "qwen3_omni")
    assert len(record) < 40_000
    for mine, theirs in zip(features(bare), features(whole), strict=True):
        assert is_bare(mine)
        assert not is_bare(theirs)
        assert feature_cost(mine) == pytest.approx(feature_cost(theirs), rel=0.01)
        left_out = theirs.data.keys() - mine.data.keys()
        assert left_out
        assert all(
            "pixel" in field or "mel" in field or "audio" in field or "mask" in field
            for field in left_out
        )
        for field in mine.data.keys() - {BARE}:
            assert equal(mine.data[field].data, theirs.data[field].data), field
    model = object.__new__(FAMILIES[name].model)
    if hasattr(model, "get_mrope_input_positions"):
        torch.nn.Module.__init__(model)
        model.config = processor_of(name).info.get_hf_config()
        ids = whole["prompt_token_ids"]
        mine, theirs = (
            model.get_mrope_input_positions(ids, features(one)) for one in (bare, whole)
        )
        assert equal(mine[0], theirs[0])
        assert mine[1] == theirs[1]


def test_a_recorded_video_goes_along_with_media_that_are_processed_here() -> None:
    name = "qwen2_5_omni"
    made, other = decoded(FAMILIES[name]), decoded(FAMILIES[name], 1)
    _, record = record_of(name, made)
    more = [
        ("<|vision_bos|><|IMAGE|><|vision_eos|>", "image", Image.new("RGB", (112, 112))),
        ("<|audio_bos|><|AUDIO|><|audio_eos|>", "audio", (np.asarray(sound(2.0)), 16_000)),
    ]
    whole = rendered(name, [other, made], more=more)
    bare = rendered(name, [other, recorded(made, record)], more=more)
    assert prompt_of(bare) == prompt_of(whole)
    found = [is_bare(feature) for feature in features(bare)]
    assert 0 < sum(found) < len(found)
    assert found[0] is False
    assert found[-2:] == [False, False]


def test_the_processor_cache_never_holds_a_bare_item() -> None:
    name = "qwen2_5_vl"
    made, cached = decoded(FAMILIES[name]), new_cache(name)
    _, record = record_of(name, made)
    bare = rendered(name, [recorded(made, record)], cached)
    assert all(map(is_bare, features(bare)))
    whole = rendered(name, [made], cached)
    assert not any(map(is_bare, features(whole)))
    # From now on the cache has the whole items, which are better.
    assert not any(map(is_bare, features(rendered(name, [recorded(made, record)], cached))))


def test_where_the_cache_had_the_items_the_record_is_the_same() -> None:
    name = "qwen2_5_vl"
    made, cached, found = decoded(FAMILIES[name]), _Forgetful(), []
    processor = processor_of(name)
    processor.recorder = lambda digest, data: found.append((digest, data))
    try:
        rendered(name, [made], cached)
        rendered(name, [made], cached)
    finally:
        processor.recorder = None
    assert len(found) == 2
    assert found[0] == found[1]


def test_items_that_are_elsewhere_in_memory_make_no_record() -> None:
    name = "qwen2_5_vl"
    made, found = decoded(FAMILIES[name]), []
    processor = processor_of(name)
    processor.recorder = lambda digest, _: found.append(digest)
    try:
        rendered(name, [made], _Addresses())
    finally:
        processor.recorder = None
    assert not found


def test_a_record_of_other_segments_is_refused() -> None:
    name = "qwen2_5_vl"
    made = decoded(FAMILIES[name])
    _, record = record_of(name, made)
    known = unpack(record, REQUEST)
    fewer = msgspec.structs.replace(known, segments=known.segments[1:])
    segment = known.segments[0]
    cells = np.frombuffer(segment.kept or b"", np.int64)
    for kept in (None, cells[1:].tobytes(), (cells + 1000).tobytes(), cells[::-1].tobytes(), b"1"):
        wrong = (msgspec.structs.replace(segment, kept=kept), *known.segments[1:])
        changed = msgspec.structs.replace(known, segments=wrong)
        with pytest.raises(RecordError):
            rendered(name, [_with(made, changed)])
    with pytest.raises(RecordError):
        rendered(name, [_with(made, fewer)])
    broken = (msgspec.structs.replace(segment, items={"video": b"?"}), *known.segments[1:])
    with pytest.raises(RecordError):
        rendered(name, [_with(made, msgspec.structs.replace(known, segments=broken))])


def test_pixels_that_are_not_here_never_reach_stock_processing() -> None:
    name = "qwen2_5_omni"
    made = decoded(FAMILIES[name])
    _, record = record_of(name, made)
    with pytest.raises(RecordError):
        rendered(name, [recorded(made, record)], use_audio_in_video=True)


def _with(made: MediaWithBytes, record: Any) -> MediaWithBytes:
    frames, metadata = made.media
    bare = RecordedFrames.of_record(record, "x", frames.reduction)
    return MediaWithBytes((bare, metadata), made.original_bytes)


class _Forgetful:
    """A processor cache as an API server's: the engine has the items, and this side their names."""

    def __init__(self) -> None:
        self._updates: dict[str, Any] = {}

    def is_cached(self, hashes: list[str]) -> list[bool]:
        return [name in self._updates for name in hashes]

    def touch_sender_cache_item(self, name: str) -> None: ...

    def get_and_update_item(self, item: Any, name: str) -> Any:
        if name in self._updates:
            return None, self._updates[name]
        self._updates[name] = item[1]
        return item

    def release_sender_touches(self) -> None: ...


class _Addresses(_Forgetful):
    """A processor cache in shared memory: what it hands on says where an item lies."""

    def is_cached(self, hashes: list[str]) -> list[bool]:
        return [False] * len(hashes)

    def get_and_update_item(self, item: Any, name: str) -> Any:  # noqa: ARG002 - as the other cache
        address = MultiModalFieldElem(data=torch.tensor(1), field=MultiModalBatchedField())
        return MultiModalKwargsItem({"address": address}), item[1]
