"""Parts of ``bench long-video`` with servers of their own: against stock, memory, decode time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import av

from vllm_mm_ext.composer.training.render import encode_clip
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.server import Server, serve_both
from vllm_mm_ext.tools.bench.bench_clips import minutes_720p, variant
from vllm_mm_ext.tools.bench.chat import ask, video_part
from vllm_mm_ext.tools.bench.followup import FRAME_SIZE, SAMPLING
from vllm_mm_ext.tools.bench.harness import Row
from vllm_mm_ext.tools.bench.long_video_client import Asker, LongAnswer
from vllm_mm_ext.tools.bench.long_video_files import Film, composer_server
from vllm_mm_ext.tools.bench.long_video_parts import Study

MIB = 1 << 20
QUESTION = "What happens in this video?"
MAP_REDUCE = {"long_video": {"strategy": "map_reduce"}}
_NOTE_PROMPT = "Note what happens."
# Of a note, on both sides: the tiny model would write on and on.
_NOTE_TOKENS = 24
_ANSWER_TOKENS = 16
# Full after a few minutes of video, so that memory is compared and not caches that fill.
_SMALL_CACHES = {"media": {"cache": {"encoded_mb": 32, "decoded_mb": 32}}}


def sequential(study: Study) -> list[Row]:
    """Notes about all windows, against a client that sends the windows to stock one by one.

    Stock vLLM cannot serve the composer, so both sides serve a tiny Qwen2.5-VL.
    """
    settings = {
        "media": {"sampling": {"fps": 1.0, "max_frames": 32}},
        "long_video": {"note_tokens": _NOTE_TOKENS, "prompts": {"note": _NOTE_PROMPT}},
    }
    args = [
        *("--allowed-local-media-path", str(study.context.work_dir)),
        *("--max-model-len", "8192"),
        *("--media-io-kwargs", SAMPLING),
        *("--mm-processor-kwargs", FRAME_SIZE),
    ]
    rows = []
    with serve_both(
        checkpoint("qwen2_5_vl"), args=args, additional_config={"mm_ext": settings}, timeout_s=900
    ) as (stock, plugin):
        # The first video request of a server pays for lazy imports and worker starts.
        for server in (stock, plugin):
            _note(server, study.films.film(700, 1).path)
        for minutes in study.minutes:
            stock_s, plugin_s = [], []
            for repeat in range(study.context.repeats):
                film = study.films.film(710 + repeat, minutes)
                answer = Asker(plugin).ask(film.path, QUESTION, options=MAP_REDUCE)
                plugin_s.append(answer.seconds)
                with study.context.scratch() as directory:
                    stock_s.append(_one_by_one(stock, _cut(film, answer, directory)))
            rows.append(
                Row.of(
                    f"{minutes} min, wall time: windows one by one to stock, map_reduce",
                    "s",
                    stock=stock_s,
                    plugin=plugin_s,
                )
            )
    study.notes.append(
        "wall time: tiny Qwen2.5-VL on both sides, 1 frame a second; a client sends stock the same "
        f"windows as files one by one, {_NOTE_TOKENS} tokens each, then the notes"
    )
    return rows


def _cut(film: Film, answer: LongAnswer, directory: Path) -> list[Path]:
    """The windows of an answer as files of their own."""
    files = []
    for window in answer.windows:
        start, end = int(window["start"]), min(round(window["end"]), film.recording.duration)
        files.append(directory / f"{start}.mp4")
        clip = film.recording.window(start, end)
        encode_clip(clip, files[-1], size=128, gop=250, sample_rate=16_000)
    return files


def _one_by_one(server: Server, files: Sequence[Path]) -> float:
    """Seconds of a client that asks for a note about each file, then for the answer."""
    started = time.perf_counter()
    notes = [_note(server, file) for file in files]
    text = "\n".join([*notes, QUESTION])
    ask(server, [{"role": "user", "content": text}], max_tokens=_ANSWER_TOKENS, ignore_end=False)
    return time.perf_counter() - started


def _note(server: Server, file: Path) -> str:
    parts = [video_part(file.as_uri()), {"type": "text", "text": _NOTE_PROMPT}]
    messages = [{"role": "user", "content": parts}]
    return ask(server, messages, max_tokens=_NOTE_TOKENS, ignore_end=False).text


def memory(study: Study) -> list[Row]:
    """Peak memory of API server and decode workers, the longest video against the shortest.

    Each length has a fresh server with small caches; the engine is left out.
    """
    peaks: dict[int, list[float]] = {}
    shortest, longest = _two_lengths(study.minutes)
    for minutes in (shortest, longest):
        peaks[minutes] = []
        for repeat in range(study.context.repeats):
            with composer_server(study.films, _SMALL_CACHES) as server:
                asker = Asker(server)
                asker.ask(study.films.film(720, 1).path, QUESTION, options=MAP_REDUCE)
                film = study.films.film(730 + repeat, minutes)
                with server.peak_memory(interval_s=0.5) as watch:
                    asker.ask(film.path, QUESTION, options=MAP_REDUCE)
                peaks[minutes].append(watch.front_end / MIB)
    return [
        Row.of(
            f"peak memory of API server and workers, {shortest} min against {longest} min",
            "MiB",
            stock=peaks[shortest],
            plugin=peaks[longest],
        )
    ]


def _two_lengths(minutes: Sequence[int]) -> tuple[int, int]:
    """The shortest and the longest; of one alone, a third of it is the shortest."""
    return (minutes[0] if len(minutes) > 1 else max(1, minutes[0] // 3)), minutes[-1]


def decode(study: Study) -> list[Row]:
    """CPU time of the decode workers over a whole video, against decoding it once in order.

    The video is of 1280x720: of small pictures, all but decoding takes most of the time.
    """
    rows = []
    with composer_server(study.films) as server:
        asker = Asker(server)
        # Workers import what they need at their first job.
        asker.ask(study.films.film(740, 1).path, QUESTION, options=MAP_REDUCE)
        for minutes in study.minutes:
            once, windows = [], []
            source = minutes_720p(study.context.work_dir, minutes)
            for repeat in range(study.context.repeats):
                path = variant(
                    source, study.films.directory / f"{source.stem}-{repeat}.mp4", repeat
                )
                once.append(sequential_decode_s(path))
                before = asker.decode_seconds()
                asker.ask(path, QUESTION, options=MAP_REDUCE)
                windows.append(asker.decode_seconds() - before)
                path.unlink()
            rows.append(
                Row.of(
                    f"{minutes} min of 720p, CPU of all windows against one decode in order",
                    "s",
                    stock=once,
                    plugin=windows,
                )
            )
    return rows


def sequential_decode_s(path: Path) -> float:
    """CPU seconds of decoding all pictures and all sound of a file in order, with PyAV."""
    started = time.process_time()
    for kind in ("video", "audio"):
        with av.open(str(path)) as container:
            streams = getattr(container.streams, kind)
            if streams:
                streams[0].thread_count = 1
                for _ in container.decode(streams[0]):
                    pass
    return time.process_time() - started
