"""Every limit and setting of vLLM's media layer holds with the plugin on.

Most tests run vLLM's own connector beside the plugin's: what stock refuses, the plugin refuses, and
what stock delivers at the limit, the plugin delivers.
"""

from __future__ import annotations

import asyncio
import base64
import os
import threading
import time
from collections.abc import Iterator
from contextvars import copy_context
from http import HTTPStatus
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vllm import envs
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMError
from vllm.multimodal.media import MediaConnector

from vllm_mm_ext.adapters import runtime as runtime_module
from vllm_mm_ext.adapters.error_answers import RefusedMediaError
from vllm_mm_ext.adapters.media.media_connector import MMExtMediaConnector
from vllm_mm_ext.adapters.runtime import attach_runtime, current_runtime
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.media.fetch.byte_gate import Claim
from vllm_mm_ext.media.fetch.byte_lease import Lease
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.request.context import RequestContext, claim_while_rendered, enter_request
from vllm_mm_ext.testing.media import make_audio, make_clip
from vllm_mm_ext.testing.origin import Origin, Resource

MIB = 1 << 20
MODALITIES = ("image", "video", "audio")
WIDTH, HEIGHT = 64, 48
Limit = pytest.MonkeyPatch
LOCAL = {"mm_ext": {"media": {"fetch": {"max_local_mb": 1}, "decode": {"workers": 1}}}}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("limits")
    make_clip(folder / "video.mp4", width=WIDTH, height=HEIGHT, duration=1)
    make_audio(folder / "audio.wav", duration=2, sample_rate=16_000)
    make_audio(folder / "stereo.flac", duration=1, sample_rate=48_000, channels=2)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "image.png")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as server:
        yield server


@pytest.fixture(autouse=True)
def detached() -> Iterator[None]:
    yield
    current_runtime().close()
    runtime_module._runtime = None


def connectors(**kwargs: Any) -> tuple[MediaConnector, MMExtMediaConnector]:
    """Stock's connector and the plugin's, with the settings now in force."""
    settings = {"media": {"decode": {"workers": 1}, "sampling": {"policy": "stock"}}}
    attach_runtime(MMExtConfig.from_additional_config({"mm_ext": settings}), ModelTraits())
    return MediaConnector(**kwargs), MMExtMediaConnector(**kwargs)


def fetch(connector: MediaConnector, modality: str, url: str) -> Any:
    return getattr(connector, f"fetch_{modality}")(url)


def refused(connector: MediaConnector, modality: str, url: str) -> Exception:
    with pytest.raises((VLLMError, ValueError)) as caught:
        fetch(connector, modality, url)
    return caught.value


def padded(path: Path, size: int) -> bytes:
    """The file with zeros behind it, which no reader minds."""
    data = path.read_bytes()
    return data + bytes(size - len(data))


def data_url(modality: str, data: bytes) -> str:
    return f"data:{modality}/x;base64,{base64.b64encode(data).decode()}"


# --- downloads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", MODALITIES)
def test_download_size(
    media: dict[str, Path], origin: Origin, monkeypatch: Limit, modality: str
) -> None:
    monkeypatch.setenv("VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", "1")
    fits = origin.serve("/fits", Resource(padded(media[modality], MIB)))
    larger = origin.serve("/larger", Resource(padded(media[modality], MIB + 1)))
    unannounced = origin.serve("/chunks", Resource(padded(media[modality], MIB + 1), chunked=True))
    for connector in connectors():
        fetch(connector, modality, fits)
        for url in (larger, unannounced):
            error = refused(connector, modality, url)
            if isinstance(connector, MMExtMediaConnector):
                assert isinstance(error, RefusedMediaError)
                assert error.http_status is HTTPStatus.REQUEST_ENTITY_TOO_LARGE
                assert "limit is 1048576 bytes (VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB)" in str(error)


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_local_files_and_media_within_a_request_are_as_large_as_the_configuration_says(
    media: dict[str, Path], modality: str
) -> None:
    folder = media[modality].parent
    attach_runtime(MMExtConfig.from_additional_config(LOCAL), ModelTraits())
    connector = MMExtMediaConnector(allowed_local_media_path=str(folder))
    file = folder / f"long{media[modality].suffix}"
    for size in (MIB, MIB + 1):
        file.write_bytes(padded(media[modality], size))
        for url in (file.as_uri(), data_url(modality, file.read_bytes())):
            if size == MIB:
                fetch(connector, modality, url)
            else:
                assert "(mm_ext.media.fetch.max_local_mb)" in str(refused(connector, modality, url))


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize(("retries", "delivered"), [("1", False), ("2", True)])
def test_retries(
    media: dict[str, Path],
    origin: Origin,
    monkeypatch: Limit,
    modality: str,
    retries: str,
    delivered: bool,
) -> None:
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", retries)
    _, ours = connectors()
    body = media[modality].read_bytes()
    url = origin.serve("/a", Resource(body, fail_first=1))
    if delivered:
        fetch(ours, modality, url)
    else:
        refused(ours, modality, url)
    assert origin.requests["/a"] == int(retries)


@pytest.mark.parametrize("modality", MODALITIES)
def test_timeouts(
    media: dict[str, Path], origin: Origin, monkeypatch: Limit, modality: str
) -> None:
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    for other in MODALITIES:
        seconds = "1" if other == modality else "1000"
        monkeypatch.setenv(f"VLLM_{other.upper()}_FETCH_TIMEOUT", seconds)
    _, ours = connectors()
    release = threading.Event()
    url = origin.serve("/a", Resource(media[modality].read_bytes(), hold=release))
    told = str(refused(ours, modality, url))
    assert "in 1 s" in told
    assert (f"VLLM_{modality.upper()}_FETCH_TIMEOUT" in told) == (modality != "image")
    release.set()


@pytest.mark.parametrize("modality", MODALITIES)
def test_redirects_off(
    media: dict[str, Path], origin: Origin, monkeypatch: Limit, modality: str
) -> None:
    origin.serve("/target", Resource(media[modality].read_bytes()))
    url = origin.serve("/a", Resource(status=302, location="/target"))
    for connector in connectors():
        fetch(connector, modality, url)
    monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
    before = origin.requests["/target"]
    for connector in connectors():
        refused(connector, modality, url)
    assert origin.requests["/target"] == before


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_forbidden_domain_is_refused_as_stock_refuses_it(
    media: dict[str, Path], origin: Origin, modality: str
) -> None:
    url = origin.serve("/a", Resource(media[modality].read_bytes()))
    both = connectors(allowed_media_domains=["media.example.org", "localhost"])
    stock, ours = (refused(connector, modality, url) for connector in both)
    assert type(ours) is type(stock)
    assert str(ours) == str(stock)
    expected, answer = (create_error_response(error).error for error in (stock, ours))
    assert (answer.code, answer.type, answer.param) == (
        expected.code,
        expected.type,
        expected.param,
    )
    assert not origin.requests
    for connector in both:
        fetch(connector, modality, origin.url("/a", "localhost"))


@pytest.mark.parametrize("modality", MODALITIES)
def test_allowed_domains_hold_across_redirects(
    media: dict[str, Path], origin: Origin, modality: str
) -> None:
    target = origin.serve("/target", Resource(media[modality].read_bytes()))
    origin.serve("/a", Resource(status=302, location=target))
    _, ours = connectors(allowed_media_domains=["localhost"])
    error = refused(ours, modality, origin.url("/a", "localhost"))
    assert "must be from one of the allowed domains" in str(error)
    assert origin.requests["/target"] == 0


@pytest.mark.parametrize("modality", MODALITIES)
def test_local_files_are_read_below_the_allowed_path_only(
    media: dict[str, Path], tmp_path: Path, modality: str
) -> None:
    outside = media[modality]
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    inside = allowed / outside.name
    inside.write_bytes(outside.read_bytes())
    link = allowed / f"link{outside.suffix}"
    link.symlink_to(outside)
    paths = (outside, link, allowed / ".." / "allowed2" / "a", Path("/etc/passwd"))
    for connector in connectors(allowed_local_media_path=str(allowed)):
        fetch(connector, modality, inside.as_uri())
        for path in paths:
            refused(connector, modality, f"file://{path}")
    for connector in connectors():
        # Stock raises a RuntimeError.
        with pytest.raises((VLLMError, ValueError, RuntimeError), match="allowed-local-media-path"):
            fetch(connector, modality, inside.as_uri())


# --- what is decoded ------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["http", "file", "data"])
def test_encoded_size_of_audio(
    media: dict[str, Path], origin: Origin, monkeypatch: Limit, tmp_path: Path, by: str
) -> None:
    monkeypatch.setenv("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", "1")

    def url(data: bytes) -> str:
        if by == "http":
            return origin.serve(f"/{len(data)}", Resource(data))
        if by == "data":
            return data_url("audio", data)
        path = tmp_path / f"{len(data)}.wav"
        path.write_bytes(data)
        return path.as_uri()

    for connector in connectors(allowed_local_media_path=str(tmp_path)):
        fetch(connector, "audio", url(padded(media["audio"], MIB)))
        refused(connector, "audio", url(padded(media["audio"], MIB + 1)))


@pytest.mark.parametrize(("limit", "delivered"), [("2", True), ("1", False), ("0", False)])
def test_duration_of_audio(
    media: dict[str, Path], monkeypatch: Limit, limit: str, delivered: bool
) -> None:
    monkeypatch.setenv("VLLM_MAX_AUDIO_DECODE_DURATION_S", limit)
    path = media["audio"]
    for connector in connectors(allowed_local_media_path=str(path.parent)):
        if delivered:
            fetch(connector, "audio", path.as_uri())
        else:
            refused(connector, "audio", path.as_uri())


@pytest.mark.parametrize(("name", "decoded"), [("audio", 2 * 16_000 * 4), ("stereo", 48_000 * 8)])
def test_decoded_bytes_of_audio_count_every_channel_at_the_files_own_rate(
    media: dict[str, Path], monkeypatch: Limit, name: str, decoded: int
) -> None:
    path = media[name]
    for limit, delivered in ((decoded, True), (decoded - 1, False), (0, False)):
        monkeypatch.setenv("VLLM_MAX_AUDIO_DECODE_BYTES", str(limit))
        stock, _ = connectors(allowed_local_media_path=str(path.parent))
        settings = {"media": {"decode": {"workers": 1}}}
        # A rate of the model's own: the limit is on what is decoded, not on what is delivered.
        config = MMExtConfig.from_additional_config({"mm_ext": settings})
        attach_runtime(config, ModelTraits(audio_rate=8_000))
        ours = MMExtMediaConnector(allowed_local_media_path=str(path.parent))
        for connector in (stock, ours):
            if delivered:
                fetch(connector, "audio", path.as_uri())
            else:
                assert "VLLM_MAX_AUDIO_DECODE_BYTES" in str(
                    refused(connector, "audio", path.as_uri())
                )


@pytest.mark.parametrize("modality", ["image", "video"])
def test_pixels_of_a_picture(media: dict[str, Path], monkeypatch: Limit, modality: str) -> None:
    path = media[modality]
    for limit, delivered in ((WIDTH * HEIGHT, True), (WIDTH * HEIGHT - 1, False), (-1, True)):
        monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", str(limit))
        for connector in connectors(allowed_local_media_path=str(path.parent)):
            if delivered:
                fetch(connector, modality, path.as_uri())
            else:
                refused(connector, modality, path.as_uri())


@pytest.mark.parametrize("loader", ["opencv", "opencv_dynamic"])
@pytest.mark.parametrize("options", [{}, {"num_frames": 3}, {"fps": 2}])
def test_frames_of_a_video(
    media: dict[str, Path], monkeypatch: Limit, loader: str, options: dict[str, int]
) -> None:
    monkeypatch.setenv("VLLM_VIDEO_LOADER_BACKEND", loader)
    path = media["video"]
    stock, ours = connectors(
        media_io_kwargs={"video": options}, allowed_local_media_path=str(path.parent)
    )
    expected, frames = (fetch(connector, "video", path.as_uri())[0] for connector in (stock, ours))
    assert np.array_equal(frames, expected)


def test_bytes_of_an_embedding(monkeypatch: Limit) -> None:
    buffer = BytesIO()
    torch.save(torch.ones(1, 1000).to_sparse(), buffer)
    text = base64.b64encode(buffer.getvalue()).decode()
    for connector in connectors():
        monkeypatch.setenv("VLLM_MAX_EMBED_DECODE_BYTES", "4000")
        assert connector.fetch_image_embedding(text).shape == (1, 1000)
        monkeypatch.setenv("VLLM_MAX_EMBED_DECODE_BYTES", "3999")
        with pytest.raises((VLLMError, ValueError), match="VLLM_MAX_EMBED_DECODE_BYTES"):
            connector.fetch_image_embedding(text)


def test_images_of_a_request_count_in_its_share_of_the_media_budget(
    media: dict[str, Path], origin: Origin, monkeypatch: Limit
) -> None:
    url = origin.serve("/image.png", Resource(padded(media["image"], MIB)))
    _, ours = connectors()
    budget = current_runtime().budget
    asked: list[Claim] = []
    grow = Claim.grow

    def seen(claim: Claim, lease: Lease, num_bytes: int, spare: int) -> bool:
        asked.append(claim)
        return grow(claim, lease, num_bytes, spare)

    monkeypatch.setattr(Claim, "grow", seen)
    context = RequestContext()

    def render() -> None:
        enter_request(context)
        with claim_while_rendered():
            fetch(ours, "image", url)
            asyncio.run(ours.fetch_image_async(url))
            assert set(asked) == {context.budget_claim(budget)}

    copy_context().run(render)
    assert budget.stats()["peak_bytes"] >= MIB
    assert budget.used == 0


# --- the cache of downloads on disk ---------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: Limit) -> Path:
    monkeypatch.setenv("VLLM_MEDIA_CACHE", str(tmp_path / "downloads"))
    return tmp_path / "downloads"


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("writer", [0, 1])
def test_downloads_are_kept_on_disk_for_stock_and_plugin_alike(
    media: dict[str, Path], origin: Origin, disk: Path, modality: str, writer: int
) -> None:
    body = media[modality].read_bytes()
    url = origin.serve(f"/a{media[modality].suffix}?q=1", Resource(body))
    path = url.removeprefix(origin.url(""))
    fetch(connectors()[writer], modality, url)
    assert [file.read_bytes() for file in disk.iterdir()] == [body]
    # In new processes, as it were, and with the origin gone.
    origin.serve(path, Resource(status=404))
    for connector in connectors():
        fetch(connector, modality, url)
    assert origin.requests[path] == 1


def test_a_follow_up_does_not_read_the_file_again(
    media: dict[str, Path], origin: Origin, disk: Path, monkeypatch: Limit
) -> None:
    url = origin.serve("/a.mp4", Resource(media["video"].read_bytes()))
    _, ours = connectors()
    for _ in range(2):
        fetch(ours, "video", url)

    def no_read(*_: object) -> bytes:
        raise AssertionError("the file was read")

    monkeypatch.setattr("vllm_mm_ext.media.fetch.download_cache.read_blob", no_read)
    fetch(ours, "video", url)
    # Another process that uses the file changes nothing but its time, which is looked at again.
    (file,) = disk.iterdir()
    os.utime(file, (time.time() - 5, time.time() - 5))
    with pytest.raises(VLLMError, match="server failed"):  # As it answers faults like this one.
        fetch(ours, "video", url)


def test_downloads_expire(
    media: dict[str, Path], origin: Origin, disk: Path, monkeypatch: Limit
) -> None:
    monkeypatch.setenv("VLLM_MEDIA_CACHE_TTL_HOURS", "1")
    url = origin.serve("/a.mp4", Resource(media["video"].read_bytes()))
    _, ours = connectors()
    for age_s, requests in ((0, 1), (3500, 1), (3700, 2)):
        for file in disk.glob("*"):
            os.utime(file, (time.time() - age_s,) * 2)
        fetch(ours, "video", url)
        assert origin.requests["/a.mp4"] == requests


def test_the_least_recently_used_downloads_make_room(
    media: dict[str, Path], origin: Origin, disk: Path, monkeypatch: Limit
) -> None:
    monkeypatch.setenv("VLLM_MEDIA_CACHE_MAX_SIZE_MB", "2")
    body = padded(media["video"], MIB)
    urls = [origin.serve(f"/{k}.mp4", Resource(body)) for k in range(3)]
    _, ours = connectors()
    fetch(ours, "video", urls[0])
    fetch(ours, "video", urls[1])
    for file in disk.iterdir():  # Long ago, so that the next use is later for certain.
        os.utime(file, (time.time() - 100,) * 2)
    fetch(ours, "video", urls[0])
    fetch(ours, "video", urls[2])
    assert sum(file.stat().st_size for file in disk.iterdir()) == 2 * MIB
    for k, requests in ((0, 1), (2, 1), (1, 2)):
        fetch(ours, "video", urls[k])
        assert origin.requests[f"/{k}.mp4"] == requests


def test_limits_and_access_hold_for_what_is_on_disk(
    media: dict[str, Path], origin: Origin, disk: Path, monkeypatch: Limit
) -> None:
    url = origin.serve("/a.wav", Resource(padded(media["audio"], 2 * MIB)))
    fetch(connectors()[1], "audio", url)
    refused(connectors(allowed_media_domains=["localhost"])[1], "audio", url)
    monkeypatch.setenv("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", "1")
    for connector in connectors():
        refused(connector, "audio", url)
    assert len(list(disk.iterdir())) == 1


def test_an_unusable_directory_is_no_reason_to_fail(
    media: dict[str, Path], origin: Origin, tmp_path: Path, monkeypatch: Limit
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLLM_MEDIA_CACHE", str(tmp_path / "file" / "below"))
    url = origin.serve("/a.mp4", Resource(media["video"].read_bytes()))
    for connector in connectors():
        fetch(connector, "video", url)


# --- nothing is left out --------------------------------------------------------------------------

ELSEWHERE = {
    "VLLM_MEDIA_CONNECTOR": "names the plugin's connector (test_serving.py)",
    "VLLM_MEDIA_LOADING_THREAD_COUNT": "threads of stock loaders, which the plugin leaves alone",
    "VLLM_MAX_AUDIO_PREPROCESS_WORKERS": "threads of speech-to-text routes, not the media layer",
    "VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES": "vLLM 0.33: charged by the connector",
    "VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB": "vLLM 0.33: charged by the connector",
}


def test_every_setting_of_vllms_media_layer_has_a_test_here() -> None:
    words = ("MEDIA", "AUDIO", "IMAGE_", "VIDEO", "EMBED_DECODE")
    settings = {name for name in envs.environment_variables if any(w in name for w in words)}
    text = Path(__file__).read_text() + "".join(
        f"VLLM_{m.upper()}_FETCH_TIMEOUT" for m in MODALITIES
    )
    untested = {name for name in settings - {"VLLM_IMAGE_TAG"} if name not in text}
    assert not untested
