"""A data URL of any media is read alike, whatever way its client wrote it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MediaConnector

from vllm_mm_ext.adapters.media.media_connector import MMExtMediaConnector
from vllm_mm_ext.adapters.runtime import attach_runtime, detach_runtime
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.media.traits import ModelTraits


@pytest.fixture(autouse=True)
def attached() -> Iterator[None]:
    attach_runtime(MMExtConfig(), ModelTraits())
    yield
    detach_runtime()


def encoded(level: int, kind: str) -> str:
    out = io.BytesIO()
    Image.new("RGB", (20, 10), (level, 0, 0)).save(out, kind)
    return base64.b64encode(out.getvalue()).decode()


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png;base64,",
        "DATA:image/png;BASE64,",
        'data:image/png;name="a, b.png";base64,',
        "data:image/png;a=b,c; Base64,",
    ],
)
async def test_images(head: str) -> None:
    text = encoded(200, "PNG")
    ours = MMExtMediaConnector()
    for written in (text, text.rstrip("="), text.replace("+", "%2B"), f"{text[:40]}\n{text[40:]}"):
        assert np.asarray(ours.fetch_image(head + written))[0, 0].tolist() == [200, 0, 0]
        image = await ours.fetch_image_async(head + written)
        assert np.asarray(image)[0, 0].tolist() == [200, 0, 0]


async def test_an_image_that_is_no_base64_is_the_clients_fault() -> None:
    with pytest.raises(VLLMValidationError, match="base64"):
        await MMExtMediaConnector().fetch_image_async("data:image/svg+xml,<svg/>")


@pytest.mark.parametrize(
    "head",
    [
        "data:video/jpeg;base64,",
        "Data:Video/JPEG;BASE64,",
        "data:video/jpeg;codecs=a,b;base64,",
    ],
)
def test_jpeg_sequences_are_left_to_vllm_and_read_as_it_reads_them(head: str) -> None:
    frames = [encoded(level, "JPEG") for level in (0, 100, 200)]
    url = "data:video/jpeg;base64," + ",".join(frames)
    expected, described = MediaConnector().fetch_video(url).media
    got, metadata = MMExtMediaConnector().fetch_video(head + ",".join(frames)).media
    assert np.array_equal(got, expected)
    assert metadata == described
