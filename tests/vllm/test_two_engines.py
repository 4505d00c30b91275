"""Engines in one process have a front-end each, which ends with its engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from front import Front, opened
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from vllm_mm_ext.adapters.error_answers import FailedMediaError
from vllm_mm_ext.adapters.runtime import runtime_of
from vllm_mm_ext.testing.media import make_clip


def config(max_frames: int, **media: Any) -> dict[str, Any]:
    sampling = {"fps": 8.0, "max_frames": max_frames, "min_frames": 2}
    return {"mm_ext": {"media": {"sampling": sampling, "decode": {"workers": 1}, **media}}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    make_clip(folder / "short.mp4", duration=4, seed=1)
    return folder


@pytest.fixture(scope="module")
def fronts(files: Path) -> Iterator[tuple[Front, Front]]:
    with (
        opened(files, additional_config=config(4)) as first,
        opened(files, additional_config=config(12)) as second,
    ):
        yield first, second


def test_each_engine_serves_by_its_own_settings(fronts: tuple[Front, Front]) -> None:
    frames = [front.render("short.mp4").videos[0]["frames"] for front in (*fronts, *fronts)]
    assert frames == [4, 12, 4, 12]


def test_engines_serve_by_their_own_settings_at_the_same_time(fronts: tuple[Front, Front]) -> None:
    async def together() -> list[int]:
        made = await asyncio.gather(
            *(front.rendered(front.messages("short.mp4")) for front in fronts * 3)
        )
        return [one.videos[0]["frames"] for one in made]

    assert asyncio.run(together()) == [4, 12] * 3


def test_engines_serve_by_their_own_settings_offline(fronts: tuple[Front, Front]) -> None:
    lengths = []
    for front in (*fronts, *fronts):
        request = ChatCompletionRequest(model="m", messages=front.messages("short.mp4"))
        params = request.build_chat_params(None, "auto")
        _, (prompt,) = front.renderer.render_chat([request.messages], params)
        lengths.append(len(prompt["prompt_token_ids"]))
    assert lengths[:2] == lengths[2:]
    assert lengths[0] < lengths[1]


def test_engines_do_not_share_caches(fronts: tuple[Front, Front]) -> None:
    first, second = (runtime_of(front.renderer) for front in fronts)
    fronts[0].render("short.mp4")
    before = second.stats()
    fronts[0].render("short.mp4", options={"max_frames": 2})
    assert second.stats() == before
    assert first is not second


def test_a_front_end_ends_when_its_engine_is_shut_down_and_no_other(files: Path) -> None:
    with opened(files, additional_config=config(4)) as staying:
        with opened(files, additional_config=config(12)) as ending:
            ended = runtime_of(ending.renderer)
            ending.render("short.mp4")
        assert ended.loop.loop.is_closed()
        # Not by the settings of another engine: they may allow what this engine's forbid.
        with pytest.raises(FailedMediaError, match="shut down") as refused:
            runtime_of(ending.renderer)
        assert refused.value.http_status == 503
        assert staying.render("short.mp4").videos[0]["frames"] == 4


def test_the_server_s_loader_options_hold_offline_too(files: Path) -> None:
    options = {"video": {"num_frames": 2}}
    with opened(files, additional_config=config(12), media_io_kwargs=options) as front:
        request = ChatCompletionRequest(model="m", messages=front.messages("short.mp4"))
        params = request.build_chat_params(None, "auto")
        _, (offline,) = front.renderer.render_chat([request.messages], params)
        # The HTTP routes hand the server's options in.
        _, (online,) = front.renderer.render_chat(
            [request.messages], params.with_defaults(default_media_io_kwargs=options)
        )
    assert offline["prompt_token_ids"] == online["prompt_token_ids"]
