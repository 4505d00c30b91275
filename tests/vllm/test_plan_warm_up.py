"""The media that a plan counts for vLLM's warm-up are those that vLLM makes up."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_mm_ext import plugin
from vllm_mm_ext.adapters.planning.loading import load
from vllm_mm_ext.adapters.planning.warm_up import warm_up_bytes
from vllm_mm_ext.testing.checkpoints import checkpoint


@pytest.mark.parametrize(
    ("family", "modalities"),
    [
        ("llava_onevision", ("video",)),
        ("llava_onevision", ("image", "video")),
        ("qwen2_5_omni", ("audio", "image", "video")),
        ("composer", ("audio", "video")),
        ("qwen2_5_vl", ()),
    ],
)
def test_made_up_media_are_counted_whole(
    family: str, modalities: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin.register()
    loaded = load(str(checkpoint(family)), context=None, mm_processor_kwargs={}, settings={})
    seen = 0
    processor = loaded.processor
    parse = processor.info.parse_mm_data

    def parsing(made: dict[str, list[object]], **kwargs: object) -> object:
        nonlocal seen
        for media in made.values():
            for one in media:
                pixels = one[0] if isinstance(one, tuple) else one
                seen += np.asarray(pixels).nbytes
        return parse(made, **kwargs)

    monkeypatch.setattr(processor.info, "parse_mm_data", parsing)
    if modalities:
        # What vLLM's API server calls when it starts.
        processor.get_dummy_mm_inputs(dict.fromkeys(modalities, 1))
    assert warm_up_bytes(loaded, modalities) == seen
