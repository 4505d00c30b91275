"""Routes that only render a prompt, which another server is then asked to answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from front import Front, opened
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.scale_out.render.serving import ServingRender
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.renderers.online_renderer import OnlineRenderer

from vllm_mm_ext.request.context import RequestContext, enter_request
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import Tone, make_clip


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    make_clip(
        tmp_path / "clip.mp4",
        width=64,
        height=48,
        duration=3,
        audio=[Tone(440.0, 0.0, 3.0)],
        seed=1,
    )
    with opened(tmp_path, model=str(checkpoint("qwen2_5_omni"))) as made:
        yield made


def render_route(front: Front) -> ServingRender:
    template: dict[str, Any] = {
        "request_logger": None,
        "chat_template": None,
        "chat_template_content_format": "auto",
    }
    config = front.renderer.config.model_config
    engine: Any = SimpleNamespace(
        vllm_config=front.renderer.config,
        model_config=config,
        renderer=front.renderer,
        input_processor=None,
    )
    models = OpenAIServingModels(engine, [BaseModelPath("m", "m")])
    return ServingRender(models, OnlineRenderer(config, front.renderer, **template))


async def test_a_video_with_sound_is_rendered_without_it(front: Front) -> None:
    trace = enter_request(RequestContext()).trace
    request = ChatCompletionRequest(model="m", messages=front.messages("clip.mp4"), max_tokens=9)
    made = await render_route(front).render_chat_request(request)
    assert isinstance(made, GenerateRequest)
    assert made.features is not None
    assert set(made.features.mm_hashes) == {"video"}
    ((_, video),) = trace.videos
    assert video.audio_s is None


async def test_a_video_is_heard_where_it_is_answered(front: Front) -> None:
    made = await front.rendered(front.messages("clip.mp4"))
    ((_, video),) = made.trace.videos
    assert video.audio_s
