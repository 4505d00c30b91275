"""``conversations``: 12 conversations of 4 turns, each about its own video, with KV for half."""

from __future__ import annotations

import contextlib
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_mm_ext.testing.checkpoints import build
from vllm_mm_ext.testing.engine_arguments import EVERY_PART, as_flags
from vllm_mm_ext.testing.server import Server, serve
from vllm_mm_ext.tools.bench.bench_clips import other_pictures
from vllm_mm_ext.tools.bench.chat import Answer, ask, conversation
from vllm_mm_ext.tools.bench.conversations_engine import (
    BLOCK,
    CHURN,
    CONFIG,
    CONTEXT,
    FPS,
    MAX_FRAMES,
    TURNS,
    VIDEO_TOKENS,
    WORDS,
    Turn,
    churn,
    kv_blocks,
    schedule,
)
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.tools.bench.inprocess import measure
from vllm_mm_ext.tools.bench.kv_bounds import optimum
from vllm_mm_ext.tools.bench.kv_costs import Costs
from vllm_mm_ext.tools.bench.kv_trace import Access, KVTrace

CONVERSATIONS = 12
# The plugin without its block pool: what is left is what the pool does.
_SIDES = ("stock", "plugin", "kv off")


def checkpoint(context: BenchContext) -> Path:
    """A small Qwen2.5-VL, wide and deep enough that prefill and encoder take noticeable time."""
    return build(
        "qwen2_5_vl",
        context.work_dir / "qwen2_5_vl-conversations",
        video_max_pixels=448 * 448,
        hidden_size=256,
        layers=4,
    )


def make_videos(work_dir: Path, media: Path, count: int) -> list[Path]:
    """Clips of 10 s, all different."""
    made = []
    for number in range(count):
        clip = other_pictures(work_dir, 50 + number, width=448, height=224, duration=10.0)
        made.append(Path(shutil.copy(clip, media / f"{number:02}.mp4")))
    return made


def run(context: BenchContext) -> BenchResult:
    """Engines in one process for what is found and encoded, servers for times."""
    model = checkpoint(context)
    answers: dict[str, list[Answer]] = {}
    with contextlib.ExitStack() as stack:
        media = stack.enter_context(context.scratch())
        begin = stack.enter_context(context.steps("conversations", 1 + 2 + len(_SIDES)))
        begin("clips")
        videos = make_videos(context.work_dir, media, CONVERSATIONS + 1)
        warm = videos.pop().rename(context.work_dir / "conversations-warm.mp4")
        turns: dict[str, list[Turn]] = {}
        traces: dict[str, KVTrace] = {}
        for side in ("stock", "plugin"):
            begin(f"{side}, engine")
            found = measure("conversations_engine", side, [str(model), str(media)])
            turns[side] = [Turn(**turn) for turn in found["turns"]]
            traces[side] = KVTrace.parse(found["trace"], side)
        for side in _SIDES:
            begin(f"{side}, server")
            with _server(model, media, side) as server:
                # The first video request of a server pays for lazy imports and worker starts.
                shutil.copy(warm, media / "warm.mp4")
                ask(server, conversation((media / "warm.mp4").as_uri(), 1))
                (media / "warm.mp4").unlink()
                answers[side] = _converse(server, videos)
    # One is the null block.
    most = most_found(traces["plugin"], kv_blocks(CONVERSATIONS) - 1)
    return BenchResult("conversations", _rows(turns, answers), _notes(turns, answers, most))


def most_found(trace: KVTrace, blocks: int) -> float:
    """Prompt tokens up to the end of a video that a pool could find at most, after first turns.

    Args:
        trace: All requests.
        blocks: Size of the pool.
    """
    return optimum(trace, _Found(trace), blocks)


class _Found(Costs):
    """Counts tokens instead of costs."""

    def __init__(self, trace: KVTrace) -> None:
        super().__init__(trace)
        self._firsts: dict[int, Access] = {}
        for access in trace.accesses:
            for item in access.items:
                self._firsts.setdefault(item.content, access)

    def of(self, access: Access, place: int) -> float:
        """Tokens of a block, of a request that is not the first one about its video."""
        if not access.items or self._firsts[access.items[0].content] is access:
            return 0.0
        end = access.items[-1].offset + access.items[-1].length
        return float(max(0, min(end - place * self.block, self.block)))


def _server(model: Path, media: Path, side: str) -> Any:
    return serve(
        model,
        plugin=side != "stock",
        args=[
            *("--allowed-local-media-path", str(media)),
            *("--max-model-len", str(CONTEXT), "--block-size", str(BLOCK)),
            *("--num-gpu-blocks-override", str(kv_blocks(CONVERSATIONS))),
            *("--limit-mm-per-prompt", '{"video": 1, "image": 0}'),
            *("--media-io-kwargs", f'{{"video": {{"fps": {FPS}, "max_frames": {MAX_FRAMES}}}}}'),
            *("--dtype", "float32", "--enable-prompt-tokens-details"),
            *(as_flags(EVERY_PART) if side != "stock" else ()),
        ],
        additional_config=None if side == "stock" else _config(side),
    )


def _config(side: str) -> dict[str, Any]:
    return {"mm_ext": {**CONFIG["mm_ext"], "kv": {"enabled": side == "plugin"}}}


def _converse(server: Server, videos: list[Path]) -> list[Answer]:
    """Answers to all turns after the first, in the order of ``schedule``."""
    found = []
    for step, (number, turn) in enumerate(schedule(len(videos))):
        messages = conversation(videos[number].as_uri(), turn)
        answer = ask(server, messages, session=f"conversation {number}")
        if turn > 1:
            found.append(answer)
        for extra in range(CHURN):
            ask(server, [{"role": "user", "content": churn(step * CHURN + extra)}])
    return found


def _rows(turns: dict[str, list[Turn]], answers: dict[str, list[Answer]]) -> list[Row]:
    later = {side: [turn for turn in all_ if turn.turn > 1] for side, all_ in turns.items()}

    def total(name: str, unit: str, values: Mapping[str, float]) -> Row:
        return Row.of(name, unit, stock=[values["stock"]], plugin=[values["plugin"]])

    prompts = {side: sum(turn.media for turn in of_side) for side, of_side in later.items()}
    hits = {side: sum(turn.cached for turn in of_side) for side, of_side in later.items()}
    encoded = {side: sum(turn.encoded for turn in of_side) for side, of_side in later.items()}
    ttft = {
        side: 1e3 * statistics.mean(answer.ttft_s for answer in of_side)
        for side, of_side in answers.items()
    }
    served = {
        side: float(sum(answer.cached_tokens for answer in of_side))
        for side, of_side in answers.items()
    }
    return [
        total("engine, turns 2-4: prompt up to the video's end from KV", "tokens", hits),
        total("the same as a share", "share", {side: hits[side] / prompts[side] for side in hits}),
        total("engine, turns 2-4: video tokens encoded again", "tokens", encoded),
        total("servers, with session ids, turns 2-4: prompt tokens from KV", "tokens", served),
        total("the same: time to first token, mean", "ms", ttft),
        Row.of(
            "the same, plugin with kv.enabled false (as `stock`) and true",
            "ms",
            stock=[ttft["kv off"]],
            plugin=[ttft["plugin"]],
        ),
    ]


def _notes(
    turns: dict[str, list[Turn]], answers: dict[str, list[Answer]], most: float
) -> list[str]:
    hits = {side: sum(t.cached for t in of_side if t.turn > 1) for side, of_side in turns.items()}
    same = [a.answer == b.answer for a, b in zip(turns["stock"], turns["plugin"], strict=True)]
    off = sum(answer.cached_tokens for answer in answers["kv off"])
    return [
        f"{CONVERSATIONS} conversations of {TURNS} turns, every round in another order; videos of "
        f"{VIDEO_TOKENS} tokens; {kv_blocks(CONVERSATIONS)} KV blocks of {BLOCK} tokens",
        f"{CHURN} text prompts of {WORDS} numbers between any two turns",
        f"a pool that knows what comes would find {most:,.0f} tokens at most; of these stock finds "
        f"{hits['stock'] / most:.2f}, the plugin {hits['plugin'] / most:.2f}",
        f"greedy answers that equal stock's: {sum(same)} of {len(same)}",
        f"plugin with kv.enabled false: {off:,} prompt tokens from KV",
    ]
