"""Media in requests for scores and embeddings, on a real server with an embedding model."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import make_clip
from vllm_mm_ext.testing.server import Server, serve

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate(("a.mp4", "b.mp4")):
        make_clip(folder / name, width=64, height=48, duration=2, seed=seed)
    return folder


@pytest.fixture(scope="module")
def server(clips: Path) -> Iterator[Server]:
    args = ["--runner", "pooling", "--allowed-local-media-path", str(clips)]
    with serve(checkpoint("qwen2_5_vl"), plugin=True, args=args) as made:
        yield made


def posted(server: Server, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and body of the answer."""
    request = urllib.request.Request(
        server.url + path,
        json.dumps({"model": server.model, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def clip(path: Path) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": path.as_uri()}}


def test_videos_are_ranked_by_a_video(server: Server, clips: Path) -> None:
    documents = [{"content": [clip(clips / name)]} for name in ("a.mp4", "b.mp4")]
    status, body = posted(server, "/rerank", {"query": documents[1], "documents": documents})
    assert status == 200, body
    best, other = body["results"]
    assert best["index"] == 1
    assert best["relevance_score"] == pytest.approx(1.0, abs=1e-3)
    assert other["relevance_score"] < best["relevance_score"]


def test_a_document_is_no_place_for_its_video(server: Server, clips: Path) -> None:
    parts = [{"type": "text", "text": "<|video_pad|>"}, clip(clips / "a.mp4")]
    status, body = posted(server, "/score", {"queries": "a", "documents": [{"content": parts}]})
    assert (status, body["error"]["param"]) == (400, "text"), body


def test_a_video_is_embedded_and_options_are_refused(server: Server, clips: Path) -> None:
    asked = {"messages": [{"role": "user", "content": [clip(clips / "a.mp4")]}]}
    status, body = posted(server, "/v1/embeddings", asked)
    assert status == 200, body
    assert len(body["data"]) == 1
    status, body = posted(server, "/v1/embeddings", {**asked, "mm_ext": {"fps": 1}})
    assert (status, body["error"]["param"]) == (400, "mm_ext"), body
