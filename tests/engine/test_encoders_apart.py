"""A real encoder instance and a real engine: answers, fallback, and who refuses what."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.numpy import load_file

from vllm_mm_ext.testing.apart_servers import Apart, apart
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import Tone, make_audio, make_clip
from vllm_mm_ext.testing.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ARGS = (
    *("--max-model-len", "4096", "--max-num-batched-tokens", "4096", "--max-num-seqs", "8"),
    *("--limit-mm-per-prompt", '{"video": 2, "audio": 2, "image": 2}', "--dtype", "float32"),
    # With it, and without prefix cache as on encoders, stock names media by a counter of requests.
    *("--mm-processor-cache-gb", "0"),
)
SETTINGS = {"segments": {"tokens": 64}, "media": {"sampling": {"fps": 2.0}}}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    root = tmp_path_factory.mktemp("fleet")
    (root / "link").symlink_to(checkpoint("qwen2_5_omni"))
    with apart(
        checkpoint("qwen2_5_omni"),
        root / "store",
        engine_checkpoint=root / "link",
        args=ARGS,
        env={"VLLM_SERVER_DEV_MODE": "1"},
        settings=SETTINGS,
        log_dir=root,
    ) as servers:
        yield servers


def clip(directory: Path, seed: int) -> str:
    file = make_clip(
        directory / f"{seed}.mp4",
        duration=4.0,
        seed=seed,
        fps=10,
        width=168,
        height=112,
        audio=[Tone(440.0 + 100 * seed, 0.0, 4.0)],
    ).path
    return f"data:video/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}"


def others(directory: Path) -> list[dict[str, Any]]:
    """A picture, and sound by itself."""
    make_audio(directory / "a.wav", duration=2.0, tones=[Tone(700.0, 0.0, 2.0)])
    sound = base64.b64encode((directory / "a.wav").read_bytes()).decode()
    image = Image.effect_mandelbrot((112, 112), (-2, -1, 1, 1), 40)
    image.save(directory / "a.png")
    picture = base64.b64encode((directory / "a.png").read_bytes()).decode()
    return [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
    ]


def body(url: str, *media: dict[str, Any], **more: Any) -> dict[str, Any]:
    content = [
        {"type": "video_url", "video_url": {"url": url}},
        *media,
        {"type": "text", "text": "What happens?"},
    ]
    return {
        "model": "model",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }


def post(server: Server, path: str, sent: Any = None) -> tuple[int, Any]:
    data = None if sent is None else json.dumps(sent).encode()
    request = urllib.request.Request(
        server.url + path, data, {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.loads(response.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def answer(server: Server, sent: Any) -> str:
    status, found = post(server, "/v1/chat/completions", sent)
    assert status == 200, found
    return str(found["choices"][0]["message"]["content"])


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def forget(server: Server, store: Path) -> None:
    """Nothing of what was asked is known any more, here or in the store."""
    assert post(server, "/reset_prefix_cache")[0] == 200
    assert post(server, "/reset_encoder_cache")[0] == 200
    for directory in store.iterdir():
        if len(directory.name) == 2:
            shutil.rmtree(directory)


def videos(engine: Server, outcome: str) -> float:
    return engine.metric("mm_ext_recorded_videos_total", outcome=outcome)


def lose_outputs(store: Path) -> int:
    """Encoder outputs are gone from the store, and records of videos are still there."""
    files = list(store.glob("??/*"))
    with_outputs = [file for file in files if "record" not in load_file(file)]
    for file in with_outputs:
        file.unlink()
    assert 0 < len(with_outputs) < len(files)
    return len(files) - len(with_outputs)


def test_encoding_apart(fleet: Apart, tmp_path: Path) -> None:
    (encoder,), (engine,) = fleet.encoders, fleet.engines
    urls = [clip(tmp_path, seed) for seed in range(2)]
    asked = [body(urls[0]), body(urls[1], *others(tmp_path))]
    apart_ = [answer(engine, sent) for sent in asked]
    # The engine goes on as outputs come, so it may be done before the encoder has answered.
    asks = "mm_ext_encoder_asks_total"
    wait_for(lambda: sum(engine.metric(asks, outcome=o) for o in ("encoded", "ended")) == 2)
    loaded = engine.metric("mm_ext_encoder_transfer_items_total", outcome="loaded")
    assert loaded > 4
    assert engine.metric("mm_ext_encoder_transfer_items_total", outcome="missed") == 0
    assert engine.metric("mm_ext_encoder_items_total") == 0
    # The engine probed the videos; it has decoded one sound that stands by itself.
    assert videos(engine, "recorded") == 2
    jobs = "mm_ext_decode_jobs_started_total"
    assert engine.metric(jobs) == len(urls) + 2
    assert encoder.metric("mm_ext_encoder_items_total") == loaded

    # An encoder answers no question; vLLM's own proxy is served, and what it names is stored.
    text = {"model": "model", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    for sent in (text, body(urls[0]), body(urls[0], stream=True), {**text, "max_tokens": 1}):
        status, found = post(encoder, "/v1/chat/completions", sent)
        assert status == 421, found
        assert "encodes media for other instances" in found["error"]["message"]
    status, found = post(encoder, "/v1/completions", {"model": "model", "prompt": "Hello"})
    assert status == 421, found
    forget(engine, fleet.store)
    assert post(encoder, "/v1/chat/completions", body(urls[0], max_tokens=1))[0] == 200
    assert len(list(fleet.store.glob("??/*"))) > 2

    os.kill(encoder.pid, signal.SIGSTOP)
    os.kill(encoder.pid, signal.SIGKILL)
    # Outputs are lost, but not the record of their video: the engine decodes the video after all.
    assert lose_outputs(fleet.store) == 1
    assert answer(engine, asked[0]) == apart_[0]
    assert videos(engine, "decoded_later") == 1
    encoded = engine.metric("mm_ext_encoder_items_total")
    assert encoded > 2

    # Without encoder the engine encodes itself, and answers the same.
    forget(engine, fleet.store)
    assert [answer(engine, sent) for sent in asked] == apart_
    assert engine.metric("mm_ext_encoder_items_total") == encoded + loaded
    assert engine.metric("mm_ext_encoder_asks_total", outcome="failed") == 1
    assert engine.metric("mm_ext_encoder_asks_total", outcome="none_up") >= 1
    assert "does not answer" in engine.log.read_text()
