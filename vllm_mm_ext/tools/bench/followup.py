"""Follow-up turns about one video: time to first token, stock against plugin."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.origin import Origin
from vllm_mm_ext.testing.server import Server, serve_both
from vllm_mm_ext.tools.bench.bench_clips import other_minute_720p
from vllm_mm_ext.tools.bench.chat import Answer, ask, conversation
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row

TURNS = 5
# 32 frames of a minute for both: stock's default for this family would be 120.
SAMPLING = '{"video": {"fps": 1, "max_frames": 32}}'
# About 60 tokens a frame pair; the family's default of up to 768 would measure the CPU's prefill.
FRAME_SIZE = '{"size": {"shortest_edge": 3136, "longest_edge": 50176}}'
_SIDES = ("stock", "plugin")


def server_args(media_dir: Path) -> list[str]:
    """Command-line flags shared by both sides."""
    return [
        *("--allowed-local-media-path", str(media_dir)),
        *("--max-model-len", "8192"),
        *("--media-io-kwargs", SAMPLING),
        *("--mm-processor-kwargs", FRAME_SIZE),
    ]


def run(context: BenchContext) -> BenchResult:
    """Turns 1-5 of a growing conversation about a 60 s 720p video, from a file and over http.

    Both servers run side by side and take turns, one request at a time; each repeat and source has
    a video whose pictures neither server has seen, and stock goes first in every other repeat.
    """
    model = checkpoint("qwen2_5_omni")
    with context.steps("clips", 1 + 2 * context.repeats) as begin:
        clips = []
        for number in range(1 + 2 * context.repeats):
            begin(str(number + 1))
            clips.append(other_minute_720p(context.work_dir, number))
    answers: dict[tuple[str, str, int], list[Answer]] = defaultdict(list)
    downloads: dict[str, list[float]] = defaultdict(list)
    encoded: list[float] = []
    with contextlib.ExitStack() as stack:
        origin = stack.enter_context(Origin())
        both = stack.enter_context(serve_both(model, args=server_args(context.work_dir)))
        servers = dict(zip(_SIDES, both, strict=True))
        # The first video request of a server pays for lazy imports and worker starts.
        _warm_up(servers, clips.pop())
        begin = stack.enter_context(context.steps("followup", 2 * context.repeats * len(_SIDES)))
        for repeat in range(context.repeats):
            local, remote = clips[2 * repeat : 2 * repeat + 2]
            url = origin.serve_file(remote)
            for side in _SIDES if repeat % 2 == 0 else _SIDES[::-1]:
                begin(f"file, {side}, repeat {repeat + 1}")
                known = encoded_tokens(servers["plugin"])
                for turn, answer in _turns(servers[side], local.as_uri()):
                    answers["file", side, turn].append(answer)
                begin(f"http, {side}, repeat {repeat + 1}")
                for turn, answer in _turns(servers[side], url):
                    answers["http", side, turn].append(answer)
                    if turn == 1:
                        first = origin.statuses[f"/{remote.name}", 200]
                downloads[side].append(origin.statuses[f"/{remote.name}", 200] - first)
                if side == "plugin":
                    encoded.append((encoded_tokens(servers[side]) - known) / 2)
    rows = []
    for source in ("file", "http"):
        for turn in range(1, TURNS + 1):
            rows.append(_row(f"TTFT, {source}, turn {turn}", answers, source, [turn]))
        rows.append(_row(f"TTFT, {source}, turns 2-5", answers, source, range(2, TURNS + 1)))
    rows.append(Row.of("bodies downloaded in turns 2-5, http, ETag", "count", **downloads))
    first_turns = answers["file", "plugin", 1]
    rows.append(
        Row.of(
            "preprocessing after the front-end, share of TTFT, turn 1",
            "%",
            plugin=[100 * a.stages.get("preprocess", 0.0) / a.ttft_s for a in first_turns],
        )
    )
    rows.append(Row.of("tokens encoded of a video, in all its turns", "tokens", plugin=encoded))
    tokens = {side: answers["file", side, 1][0].prompt_tokens for side in _SIDES}
    notes = [
        f"tiny Qwen2.5-Omni, 32 frames; prompt of turn 1: {tokens['stock']} tokens stock, "
        f"{tokens['plugin']} plugin",
        "http: the origin sends an ETag and no Cache-Control, so every turn must revalidate",
    ]
    return BenchResult("followup", rows, notes)


def _warm_up(servers: dict[str, Server], file: Path) -> None:
    for server in servers.values():
        for _ in _turns(server, file.as_uri(), 2):
            pass


def encoded_tokens(server: Server) -> float:
    """Tokens that have gone through the encoders of a server with the plugin."""
    return server.metric("mm_ext_encoder_tokens_total")


def _turns(server: Server, url: str, turns: int = TURNS) -> Iterator[tuple[int, Answer]]:
    """One turn after the other, each asked when the caller has seen the one before."""
    for turn in range(1, turns + 1):
        yield turn, ask(server, conversation(url, turn))


def _row(
    name: str,
    answers: dict[tuple[str, str, int], list[Answer]],
    source: str,
    turns: list[int] | range,
) -> Row:
    runs = {
        side: [1e3 * a.ttft_s for turn in turns for a in answers[source, side, turn]]
        for side in _SIDES
    }
    return Row.of(name, "ms", stock=runs["stock"], plugin=runs["plugin"])
