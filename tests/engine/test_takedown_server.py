"""What an operator sees and does, on a real server with two API servers."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import yaml
from blake3 import blake3
from memory_search import Content, search
from PIL import Image
from websockets.sync.client import connect

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.origin import Origin, Resource
from vllm_mm_ext.testing.server import Server, serve

pytestmark = pytest.mark.engine

CONFIG = Path(__file__).parents[2] / "configs" / "tiny-cpu.yaml"
KEY = "secret"
SIGHT = {"page": True, "admin": True, "thumbnails": True}


def noise(path: Path, seed: int, seconds: float = 3.0) -> bytes:
    """A video whose pictures and bytes are like no others."""
    pictures = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        stream.options = {"crf": "20", "preset": "ultrafast"}
        for _ in range(round(8 * seconds)):
            picture = pictures.integers(0, 256, (240, 320, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def config_file(folder: Path, sight: dict[str, bool]) -> str:
    """A configuration in ``folder`` with these settings of ``sight``."""
    config = yaml.safe_load(CONFIG.read_text())
    config["additional-config"]["mm_ext"]["sight"] = sight
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "config.yaml")


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with Origin() as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("sight")
    args = ["--config", config_file(folder, SIGHT), "--api-key", KEY, "--api-server-count", "2"]
    env = {
        "VLLM_MEDIA_CACHE": str(folder / "downloads"),
        "VLLM_ENABLE_RESPONSES_API_STORE": "1",
        # A worker apart has media of its own to let go of.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    with serve(checkpoint("qwen2_5_omni"), plugin=True, args=args, env=env) as running:
        yield running


def call(server: Server, path: str, body: Any = None, key: str = KEY) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=180) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def chat(server: Server, *urls: str, **extra: Any) -> tuple[int, Any]:
    content: list[Any] = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": "What is it?"})
    message = {"role": "user", "content": content}
    body = {"model": server.model, "messages": [message], "max_tokens": 4, **extra}
    return call(server, "/v1/chat/completions", body)


def overview(server: Server) -> dict[str, Any]:
    """What the page shows now; what was asked within the last second is shown again."""
    time.sleep(1.1)
    status, told = call(server, "/mm_ext/sight")
    assert status == 200, told
    found: dict[str, Any] = told
    return found


def record_of(server: Server, seen: dict[str, Any], name: str) -> dict[str, Any]:
    """The record of a request about a file."""
    row = next(r for r in seen["requests"] if name in r["media"][0]["name"])
    found: dict[str, Any] = call(server, f"/mm_ext/requests/{row['id']}")[1]
    return found


def pictures_of(record: dict[str, Any]) -> bytes:
    return b"".join(base64.b64decode(one) for one in record["media"][0]["pictures"])


def processes(server: Server) -> list[int]:
    return [server.pid, *(p.pid for p in psutil.Process(server.pid).children(recursive=True))]


def decoded(server: Server, num_bytes: int) -> bytes:
    """Frames of so many bytes, as they lie in the memory of an API server."""
    for pid in processes(server):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            found = re.match(r"(\w+)-(\w+) .*/memfd:vllm_mm_ext", line)
            if found is None:
                continue
            start, end = (int(group, 16) for group in found.groups())
            if 0 <= end - start - num_bytes < 4096:
                with open(f"/proc/{pid}/mem", "rb") as memory:
                    memory.seek(start)
                    return memory.read(num_bytes)
    raise AssertionError("no API server holds such frames")


def pieces(server: Server, contents: dict[str, Content]) -> dict[str, int]:
    return {name: len(found) for name, found in search(processes(server), contents).items()}


def test_a_takedown_leaves_no_byte_in_any_process(
    server: Server, origin: Origin, tmp_path: Path
) -> None:
    encoded, other = noise(tmp_path / "a.mp4", 1), noise(tmp_path / "b.mp4", 2)
    gone = origin.serve("/gone.mp4", Resource(encoded, etag='"1"'))
    kept = origin.serve("/kept.mp4", Resource(other, etag='"2"'))
    data = "data:video/mp4;base64," + base64.b64encode(encoded).decode()
    assert chat(server, gone)[0] == 200
    record = record_of(server, overview(server), "gone.mp4")
    medium = record["media"][0]
    assert {stage for stage, *_ in record["timeline"]} >= {"fetch", "preprocess", "queue"}
    height, width = medium["size"]
    frames = decoded(server, medium["frames"] * height * width * 3)
    # Whichever API server is free takes a request: both, if many come at once.
    seen: dict[str, Any] = {"requests": []}
    with ThreadPoolExecutor(6) as clients:
        while {row["id"][0] for row in seen["requests"]} < {"0", "1"}:
            answers = clients.map(lambda url: chat(server, url)[0], (gone, kept, data) * 2)
            assert set(answers) == {200}
            seen = overview(server)
    others = record_of(server, seen, "kept.mp4")
    contents = {
        "file": Content(encoded, apart_from=other),
        "frames": Content(frames),
        "pictures": Content(pictures_of(record), apart_from=pictures_of(others)),
    }
    before = pieces(server, contents)
    assert before["file"] > len(encoded) / 256
    assert before["frames"] > len(frames) / 256

    status, done = call(server, "/mm_ext/media/drop", {"url": gone})
    assert (status, done["complete"], done["digests"]) == (200, True, [medium["digest"]])
    assert done["kv_blocks"]
    assert done["inputs"]
    assert done["outputs"]
    assert pieces(server, contents) == {"file": 0, "frames": 0, "pictures": 0}
    again = call(server, f"/mm_ext/requests/{record['id']}")[1]
    assert again["media"] == [{"modality": "video", "taken_down": True}]
    # Others lost nothing, and the server serves on.
    items = overview(server)["engines"][0]["kv"]["items"]
    assert {item["url"] for item in items} == {kept}
    assert chat(server, kept, gone)[0] == 200


@pytest.mark.parametrize("options", [{}, {"long_video": {"strategy": "map_reduce"}}])
def test_requests_about_media_that_are_taken_down_end_with_410(
    server: Server, origin: Origin, tmp_path: Path, options: dict[str, Any]
) -> None:
    held, encoded = threading.Event(), noise(tmp_path / "s.mp4", 3)
    other = noise(tmp_path / "o.mp4", 5)
    url = origin.serve("/slow.mp4", Resource(encoded, hold=held))
    answers: list[tuple[int, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(chat(server, url, mm_ext=options)))
    asking.start()
    while not any(s["running"] for s in call(server, "/mm_ext/sight")[1]["servers"]):
        time.sleep(0.1)
    status, done = call(server, "/mm_ext/media/drop", {"url": url})
    held.set()
    asking.join(60)
    assert (status, done["requests_ended"]) == (200, 1)
    assert answers[0][0] == 410
    assert "taken down" in answers[0][1]["error"]["message"]
    # Nobody has fetched the file any more.
    assert pieces(server, {"file": Content(encoded, apart_from=other)}) == {"file": 0}


def test_a_response_in_the_background_ends_with_its_media(server: Server, origin: Origin) -> None:
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(6).integers(0, 256, (64, 64, 3), np.uint8)).save(
        picture, "png"
    )
    url = origin.serve("/background.png", Resource(picture.getvalue()))
    asked = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "Why?"}]
    body = {"model": server.model, "input": [{"role": "user", "content": asked}]}
    endless = {"max_output_tokens": 10_000, "ignore_eos": True}
    status, queued = call(server, "/v1/responses", {**body, **endless, "background": True})
    assert (status, queued["status"]) == (200, "queued"), queued
    status, done = call(server, "/mm_ext/media/drop", {"url": url})
    assert (status, done["requests_ended"], done["complete"]) == (200, 1, True), done
    assert not any(one["running"] for one in overview(server)["servers"])


def test_a_request_that_names_its_file_by_uuid_alone_ends_with_the_file(
    server: Server, origin: Origin, tmp_path: Path
) -> None:
    url = origin.serve("/named.mp4", Resource(noise(tmp_path / "n.mp4", 8), etag='"8"'))
    video = {"type": "video_url", "video_url": {"url": url}, "uuid": "by name"}
    text = {"type": "text", "text": "What is it?"}

    def body(part: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {
            "model": server.model,
            "messages": [{"role": "user", "content": [part, text]}],
        } | more

    assert call(server, "/v1/chat/completions", body(video, max_tokens=4))[0] == 200
    endless = {"max_tokens": 10_000, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        data=json.dumps(body({**video, "video_url": None}, **endless)).encode(),
        headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    for _ in range(100):
        try:
            stream = urllib.request.urlopen(request, timeout=60)
            break
        except urllib.error.HTTPError as error:
            # The other API server does not hold the video.
            if error.code != 400:
                raise
    with stream:
        assert stream.readline().startswith(b"data: ")
        status, done = call(server, "/mm_ext/media/drop", {"url": url})
        assert (status, done["requests_ended"], done["complete"]) == (200, 1, True), done
        with pytest.raises(http.client.IncompleteRead):
            stream.read()
    assert done["items"]
    assert done["kv_blocks"]


@pytest.mark.parametrize("is_open", [False, True])
def test_what_was_made_of_a_picture_of_a_live_session_is_taken_down(
    server: Server, is_open: bool
) -> None:
    picture = io.BytesIO()
    pixels = np.random.default_rng(7 + is_open).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(picture, "png")
    digest = blake3(picture.getvalue()).hexdigest()
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    content = [
        {"type": "input_image", "image_url": url},
        {"type": "input_text", "text": "Who? " * 200},
    ]
    item = {"type": "message", "role": "user", "content": content}
    events = [
        {"type": "conversation.item.create", "item": item},
        {"type": "response.create", "response": {"max_output_tokens": 4}},
    ]
    address = f"{server.url.replace('http', 'ws')}/mm_ext/realtime"
    headers = {"Authorization": f"Bearer {KEY}"}
    with ExitStack() as session:
        socket = session.enter_context(connect(address, additional_headers=headers))
        for event in events:
            socket.send(json.dumps(event))
        while json.loads(socket.recv(60))["type"] != "response.done":
            pass
        if not is_open:
            session.close()
            while any(one["sessions"] for one in overview(server)["servers"]):
                pass
        status, done = call(server, "/mm_ext/media/drop", {"digest": digest})
        assert (status, done["complete"], done["sessions_ended"]) == (200, True, int(is_open)), done
        assert done["inputs"]
        assert done["outputs"]
        assert done["kv_blocks"]
    done = call(server, "/mm_ext/media/drop", {"digest": digest})[1]
    assert (done["complete"], done["items"]) == (True, 0)


def test_sessions_and_media_are_pinned_and_released(
    server: Server, origin: Origin, tmp_path: Path
) -> None:
    url = origin.serve("/pinned.mp4", Resource(noise(tmp_path / "p.mp4", 4), etag='"4"'))
    assert chat(server, url, session_id="talk")[0] == 200

    def sessions() -> dict[str, bool]:
        engine = overview(server)["engines"][0]
        return {one["id"]: one["pinned"] for one in engine["kv"]["sessions"]}

    assert call(server, "/mm_ext/sessions/pin", {"session_id": "talk"})[0] == 200
    pinned = call(server, "/mm_ext/media/pin", {"url": url})[1]
    assert pinned["items"] > 0
    assert sessions()["talk"]
    assert sessions()[f"media:{pinned['digests'][0]}"]
    assert call(server, "/mm_ext/sessions/release", {"session_id": "talk"})[0] == 200
    assert call(server, "/mm_ext/media/unpin", {"url": url})[1]["items"] == pinned["items"]
    assert not sessions().keys() & {"talk", f"media:{pinned['digests'][0]}"}


def test_without_the_key_nothing_is_told_and_nothing_done(server: Server) -> None:
    for path, body in (
        ("/mm_ext/sight", None),
        ("/mm_ext/requests/0-1", None),
        ("/mm_ext/media/drop", {"url": "http://a/b"}),
        ("/mm_ext/sessions/pin", {"session_id": "a"}),
    ):
        assert call(server, path, body, key="other")[0] == 401
    assert "<title>" in server.get("/mm_ext/")


def test_top_shows_a_running_server(server: Server) -> None:
    command = [sys.executable, "-c", "from vllm_mm_ext.tools.cli.main import app; app()"]
    command += ["top", server.url]
    env = {**os.environ, "COLUMNS": "140", "VLLM_API_KEY": KEY}
    shown = subprocess.run([*command, "--once"], env=env, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "API server 1" in shown.stdout
    told = subprocess.run([*command, "--json"], env=env, capture_output=True, text=True)
    assert json.loads(told.stdout)["model"] == server.model
    refused = subprocess.run([*command, "--once", "--api-key", "x"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "API key" in refused.stderr
