"""A real server with the plugin: answers, headers, sound in video, and errors a client can read."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import Tone, make_audio, make_clip, truncate
from vllm_mm_ext.testing.origin import Origin
from vllm_mm_ext.testing.scraped import Scraped
from vllm_mm_ext.testing.server import Server, serve

pytestmark = pytest.mark.engine

CONFIG = {
    "mm_ext": {
        "media": {
            "sampling": {"policy": "uniform", "fps": 2.0, "max_frames": 8},
            "decode": {"workers": 2, "max_duration_s": 20, "timeout_s": 20},
            "audio": {"max_duration_s": 30},
        },
        "reports": {"cache_hits": True},
    }
}


@dataclass(frozen=True)
class Served:
    """The server, its client, and the files it may read."""

    server: Server
    client: openai.OpenAI
    files: Path

    def ask(self, *parts: dict[str, Any], text: str = "What is this?") -> tuple[str, Any, Any]:
        """Answer, ``X-MM-Ext`` and usage of one greedy question."""
        content = [*parts, {"type": "text", "text": text}]
        response = self.client.chat.completions.with_raw_response.create(
            model=self.server.model,
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
            max_tokens=8,
            temperature=0,
        )
        answer = response.parse()
        applied = json.loads(response.headers.get("x-mm-ext", "null"))
        return answer.choices[0].message.content or "", applied, answer.usage

    def video(self, name: str) -> dict[str, Any]:
        """Message part for a video file."""
        return {"type": "video_url", "video_url": {"url": (self.files / name).as_uri()}}

    def audio(self, name: str) -> dict[str, Any]:
        """Message part for an audio file."""
        return {"type": "audio_url", "audio_url": {"url": (self.files / name).as_uri()}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    files = tmp_path_factory.mktemp("served")
    tone = [Tone(440.0, 0.0, 4.0)]
    make_clip(files / "sound.mp4", duration=4, audio=tone, seed=1)
    make_clip(files / "silent.mp4", duration=4, seed=2)
    make_clip(files / "long.mp4", width=64, height=64, fps=2, duration=60, seed=3)
    make_audio(files / "tone.wav", duration=2.0, tones=tone)
    make_audio(files / "long.flac", duration=60.0, tones=tone, sample_rate=8000)
    Image.new("RGB", (64, 64)).save(files / "picture.mp4", format="png")
    (files / "page.mp4").write_text("<!doctype html><title>Not found</title>")
    truncate(files / "sound.mp4", files / "cut.mp4", keep=0.1)
    args = ["--allowed-local-media-path", str(files), "--max-model-len", "8192"]
    args += ["--limit-mm-per-prompt", '{"video": 2, "audio": 1, "image": 1}']
    model = checkpoint("qwen2_5_omni")
    with serve(model, plugin=True, args=args, additional_config=CONFIG) as server:
        yield Served(server, server.client(), files)


def test_a_video_is_answered_and_the_headers_say_what_was_used(served: Served) -> None:
    _, applied, usage = served.ask(served.video("sound.mp4"))
    (video,) = applied["videos"]
    assert (video["policy"], video["frames"]) == ("uniform", 8)
    assert len(video["times"]) == 8
    assert video["times"] == sorted(video["times"])
    assert video["audio_s"] == pytest.approx(4.0, abs=0.1)
    tokens = applied["tokens"]
    assert tokens["video"] > 0
    # 25 tokens a second of sound (one per four 10 ms frames).
    assert tokens["audio"] == pytest.approx(100, abs=3)
    assert sum(tokens.values()) == usage.prompt_tokens


def test_a_server_that_serves_says_that_it_is_healthy(served: Served) -> None:
    found = json.loads(served.server.get("/mm_ext/health"))
    assert found == {"ok": True, "problems": {}}


def test_a_follow_up_is_served_from_the_cache_and_answers_the_same(served: Served) -> None:
    served.ask(served.video("sound.mp4"))
    before = json.loads(served.server.get("/mm_ext/stats"))
    first, _, _ = served.ask(served.video("sound.mp4"))
    second, applied, _ = served.ask(served.video("sound.mp4"))
    after = json.loads(served.server.get("/mm_ext/stats"))
    assert applied["videos"][0]["cached"]
    assert after["decode"]["jobs"] == before["decode"]["jobs"]
    assert first == second


def test_the_sound_of_a_video_changes_the_answer_and_silence_is_no_error(served: Served) -> None:
    _, silent, _ = served.ask(served.video("silent.mp4"))
    assert silent["videos"][0]["audio_s"] is None
    assert silent["tokens"].get("audio", 0) == 0
    _, mixed, _ = served.ask(served.video("sound.mp4"), served.video("silent.mp4"))
    assert [v["audio_s"] is None for v in mixed["videos"]] == [False, True]


def test_video_with_sound_and_separate_audio_work_together_within_the_audio_limit(
    served: Served,
) -> None:
    _, applied, _ = served.ask(served.video("sound.mp4"), served.audio("tone.wav"))
    assert applied["tokens"]["audio"] == pytest.approx(150, abs=5)
    _, alone, _ = served.ask(served.audio("tone.wav"))
    assert alone["tokens"]["audio"] == pytest.approx(50, abs=3)


def test_a_request_without_media_has_no_media_headers(served: Served) -> None:
    answer, applied, _ = served.ask()
    assert applied is None
    assert answer


def test_data_urls_and_http_urls_are_served(served: Served) -> None:
    path = served.files / "sound.mp4"
    data = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    by_file, _, _ = served.ask(served.video("sound.mp4"))
    by_data, _, _ = served.ask({"type": "video_url", "video_url": {"url": data}})
    with Origin() as origin:
        url = origin.serve_file(path)
        by_http, applied, _ = served.ask({"type": "video_url", "video_url": {"url": url}})
    assert by_file == by_data == by_http
    assert applied["videos"][0]["cached"], "the same bytes are the same video, whatever the URL"


BAD = {
    "outside the allowed folder": (400, "video", "file:///etc/passwd", "allowed-local-media-path"),
    "missing file": (422, "video", "FILES/none.mp4", "does not exist"),
    "not media": (422, "video", "FILES/page.mp4", "media"),
    "truncated": (422, "video", "FILES/cut.mp4", "media"),
    "a picture": (415, "video", "FILES/picture.mp4", "supported"),
    "no video stream": (422, "video", "FILES/tone.wav", "video"),
    "no audio stream": (422, "audio", "FILES/silent.mp4", "audio"),
    "video too long": (413, "video", "FILES/long.mp4", "20"),
    "audio too long": (413, "audio", "FILES/long.flac", "30"),
    "unknown scheme": (400, "video", "ftp://host/clip.mp4", "http"),
    "bad base64": (400, "video", "data:video/mp4;base64,@@@@", "base64"),
    "http 404": (422, "video", "ORIGIN/none.mp4", "404"),
}


@pytest.mark.parametrize(("status", "modality", "url", "word"), BAD.values(), ids=BAD.keys())
def test_bad_media_is_a_4xx_that_names_the_cause(
    served: Served, status: int, modality: str, url: str, word: str
) -> None:
    with Origin() as origin:
        url = url.replace("FILES", served.files.as_uri())
        url = url.replace("ORIGIN", origin.url("").rstrip("/"))
        with pytest.raises(openai.APIStatusError) as error:
            served.ask({"type": f"{modality}_url", f"{modality}_url": {"url": url}})
    assert error.value.status_code == status
    assert word.lower() in error.value.message.lower()
    assert error.value.param
    assert served.server.alive()


@pytest.mark.parametrize("stream", [False, True])
def test_media_that_the_engine_never_got_may_be_sent_again(served: Served, stream: bool) -> None:
    """vLLM refuses the finished prompt, and takes the sound in it for known to the engine."""
    name = f"lost-{stream}.wav"
    make_audio(served.files / name, duration=29.0 - stream)
    body = {"model": served.server.model, "prompt": "long " * 1000}
    counted = httpx.post(f"{served.server.url}/tokenize", json=body, timeout=60).json()["count"]
    # The text alone fits into the context; with the 700 tokens of the sound, it does not.
    with pytest.raises(openai.BadRequestError, match="8192"):
        served.ask(served.audio(name), text="long " * (7900 * 1000 // counted))
    messages: Any = [{"role": "user", "content": [served.audio(name)]}]
    ask = served.client.chat.completions.create
    with pytest.raises(openai.APIError) as lost:
        list(ask(model=served.server.model, messages=messages, max_tokens=1, stream=stream))
    assert "Send it again" in lost.value.message
    if isinstance(lost.value, openai.APIStatusError):
        assert lost.value.status_code == 503
        assert lost.value.response.headers["retry-after"] == "1"
    else:
        # The stream had begun.
        assert stream
        assert lost.value.code == "503"
    assert served.ask(served.audio(name))[0]


def test_too_many_items_are_refused_before_anything_is_read(served: Served) -> None:
    before = json.loads(served.server.get("/mm_ext/stats"))
    with pytest.raises(openai.BadRequestError, match="At most 2 video"):
        served.ask(*[served.video("long.mp4")] * 3)
    assert json.loads(served.server.get("/mm_ext/stats"))["decode"] == before["decode"]


def test_raw_media_options_stay_closed(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="media_io_kwargs"):
        served.client.chat.completions.create(
            model=served.server.model,
            messages=[{"role": "user", "content": "hi"}],
            extra_body={"media_io_kwargs": {"video": {"fps": 1e9}}},
        )


def test_other_requests_are_untouched_by_bad_ones(served: Served) -> None:
    expected, _, _ = served.ask(served.video("sound.mp4"))

    def bad(number: int) -> int:
        name = ("page.mp4", "cut.mp4", "tone.wav", "long.mp4")[number % 4]
        with pytest.raises(openai.APIStatusError) as error:
            served.ask(served.video(name))
        return error.value.status_code

    with ThreadPoolExecutor(12) as pool:
        codes = pool.map(bad, range(32))
        good = [pool.submit(served.ask, served.video("sound.mp4")) for _ in range(8)]
        assert [future.result()[0] for future in good] == [expected] * 8
        assert all(400 <= code < 500 for code in codes)


def test_a_file_that_changes_between_turns_is_seen(served: Served) -> None:
    target = served.files / "changing.mp4"
    target.write_bytes((served.files / "sound.mp4").read_bytes())
    first, _, _ = served.ask(served.video("changing.mp4"))
    time.sleep(0.05)
    target.write_bytes((served.files / "silent.mp4").read_bytes())
    second, applied, _ = served.ask(served.video("changing.mp4"))
    assert first != second
    assert applied["videos"][0]["audio_s"] is None


def test_a_scrape_counts_what_the_one_api_server_served(served: Served) -> None:
    before = Scraped(served.server.get("/metrics"))
    _, _, usage = served.ask(served.video("sound.mp4"), text="Which metrics?")
    after = Scraped(served.server.get("/metrics"))

    def grown(name: str, **labels: str) -> float:
        return after.sum(name, **labels) - before.sum(name, **labels)

    assert grown("mm_ext_media_items_total", modality="video") == 1
    assert grown("mm_ext_prompt_tokens_total") == usage.prompt_tokens
    cached = grown("mm_ext_prompt_tokens_total", source="prefix_cache")
    assert grown("mm_ext_engine_tokens_total", kind="prefill") == usage.prompt_tokens - cached
    assert grown("mm_ext_stage_seconds_count", stage="queue") == 1
    # vLLM counts the same.
    assert grown("vllm:prompt_tokens_total") == usage.prompt_tokens
    assert len({family.name for family in after.families}) == len(after.families)
