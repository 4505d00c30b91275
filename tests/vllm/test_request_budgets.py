"""vLLM's bounds on the media of one request hold with the plugin, and say what stock vLLM says."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from front import opened
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.multimodal.media import MediaConnector

from vllm_mm_ext.adapters.media.media_connector import MMExtMediaConnector
from vllm_mm_ext.adapters.media.request_budgets import warn_of_decode_bound
from vllm_mm_ext.adapters.runtime import attach_runtime, current_runtime, detach_runtime
from vllm_mm_ext.config.media_settings import DecodeConfig
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.testing.media import make_audio, make_clip
from vllm_mm_ext.testing.origin import Origin, Resource

pytestmark = pytest.mark.skipif(
    "decoded_budget" not in inspect.signature(MediaConnector).parameters,
    reason="this vLLM has no budgets for a request's media",
)

DECODED = "VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES"
DOWNLOADED = "VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budgets")
    make_clip(folder / "clip.mp4", duration=2, width=64, height=48, seed=1)
    # 0.6 MB: the limits on downloads are whole megabytes.
    make_audio(folder / "sound.wav", duration=19.0, sample_rate=16_000)
    return folder


@pytest.fixture(autouse=True)
def detached() -> Iterator[None]:
    yield
    detach_runtime()


def budgeted(cls: Any, **kwargs: Any) -> Any:
    """A connector as vLLM makes one for a part of a request, with budgets of its own."""
    from vllm.connections import MediaRequestDownloadBudget
    from vllm.multimodal.media import MediaDecodedBudget

    return cls(
        decoded_budget=MediaDecodedBudget(), download_budget=MediaRequestDownloadBudget(), **kwargs
    )


def attach() -> None:
    config = MMExtConfig.from_additional_config({"mm_ext": {"media": {"decode": {"workers": 1}}}})
    attach_runtime(config, ModelTraits(audio_rate=16_000))


def test_decoded_media_past_the_requests_budget_are_refused_as_by_stock(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach()
    url = (files / "clip.mp4").as_uri()
    stock, ours = (
        budgeted(cls, allowed_local_media_path=str(files))
        for cls in (MediaConnector, MMExtMediaConnector)
    )
    one = ours.fetch_video(url).media[0].nbytes
    assert ours.decoded_budget.used == one
    monkeypatch.setenv(DECODED, str(2 * one))
    ours.fetch_video(url)
    with pytest.raises(ValueError, match=DECODED) as refused:
        ours.fetch_video(url)
    stock.decoded_budget.used = ours.decoded_budget.used
    with pytest.raises(ValueError, match=DECODED) as by_stock:
        stock.fetch_video(url)
    assert same_but_for_bytes(refused.value, by_stock.value)
    with pytest.raises(ValueError, match=DECODED):
        asyncio.run(ours.fetch_video_async(url))


def same_but_for_bytes(one: Exception, other: Exception) -> bool:
    return type(one) is type(other) and re.sub(r"\d+ bytes", "", str(one)) == re.sub(
        r"\d+ bytes", "", str(other)
    )


def test_sound_counts_in_the_same_budget(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attach()
    ours = budgeted(MMExtMediaConnector, allowed_local_media_path=str(files))
    waveform, _ = ours.fetch_audio((files / "sound.wav").as_uri())
    assert ours.decoded_budget.used == waveform.nbytes
    monkeypatch.setenv(DECODED, str(waveform.nbytes))
    with pytest.raises(ValueError, match=DECODED):
        asyncio.run(ours.fetch_audio_async((files / "sound.wav").as_uri()))


@pytest.mark.parametrize("cached", [False, True])
def test_downloads_past_the_requests_budget_are_a_422_cached_or_not(
    files: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    attach()
    monkeypatch.setenv(DOWNLOADED, "1")
    body = (files / "sound.wav").read_bytes()
    assert 0.5 < len(body) / (1 << 20) < 1
    with Origin() as origin:
        headers = {"Cache-Control": "max-age=600" if cached else "no-store"}
        url = origin.serve("/sound.wav", Resource(body, headers=headers))
        errors = []
        for cls in (MediaConnector, MMExtMediaConnector):
            connector = budgeted(cls)
            connector.fetch_audio(url)
            with pytest.raises(VLLMUnprocessableEntityError, match=DOWNLOADED) as refused:
                connector.fetch_audio(url)
            errors.append(refused.value)
        assert same_but_for_bytes(*errors)
        # A fresh request has a fresh budget.
        budgeted(MMExtMediaConnector).fetch_audio(url)


def test_files_cost_no_download(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attach()
    monkeypatch.setenv(DOWNLOADED, "1")
    ours = budgeted(MMExtMediaConnector, allowed_local_media_path=str(files))
    for _ in range(3):
        ours.fetch_audio((files / "sound.wav").as_uri())
    assert ours.download_budget.used == 0


def test_a_planned_request_is_charged_for_all_its_videos(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(files) as front:
        rendered = front.render("clip.mp4")
        (video,) = rendered.videos
        height, width = video["size"]
        one = video["frames"] * height * width * 3
        monkeypatch.setenv(DECODED, str(2 * one))
        front.render("clip.mp4", "clip.mp4")
        with pytest.raises(ValueError, match=DECODED):
            front.render("clip.mp4", "clip.mp4", "clip.mp4")


def test_what_is_more_than_a_request_may_download_is_refused_before_decoding(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = (files / "clip.mp4").read_bytes()
    monkeypatch.setenv(DOWNLOADED, "1")
    with opened(files) as front, Origin() as origin:
        url = origin.serve("/a.mp4", Resource(clip + bytes(600_000)))

        def render(uses: int) -> None:
            parts = [{"type": "video_url", "video_url": {"url": url}}] * uses
            front.render_messages([{"role": "user", "content": parts}])

        with pytest.raises(VLLMUnprocessableEntityError, match=DOWNLOADED):
            render(2)
        assert current_runtime().frontend.pool.stats()["jobs"] == 1  # The probe.
        render(1)


@pytest.mark.parametrize(
    ("decode", "bound", "warnings"),
    [
        ({}, None, 0),
        ({"max_output_mb": 600}, None, 0),
        ({"max_output_mb": 2000}, None, 1),
        ({"max_output_mb": 2000}, str(2000 << 20), 0),
        ({"max_output_mb": 2000}, "0", 0),
    ],
)
def test_the_operator_is_told_of_a_setting_that_vllm_does_not_let_hold(
    decode: dict[str, int],
    bound: str | None,
    warnings: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if bound is not None:
        monkeypatch.setenv(DECODED, bound)
    with caplog.at_level(logging.WARNING):
        warn_of_decode_bound(DecodeConfig.model_validate(decode))
    told = [record for record in caplog.records if DECODED in record.getMessage()]
    assert len(told) == warnings
