"""Conversations about videos in an engine that has KV for half of them: what is found again.

    python -m vllm_mm_ext.tools.bench.conversations_engine SIDE MODEL MEDIA

Run by ``bench.conversations`` and by the engine test; prints JSON.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_mm_ext.testing.engine_arguments import EVERY_PART
from vllm_mm_ext.testing.step_trace import record_steps
from vllm_mm_ext.tools.bench.chat import QUESTIONS, conversation
from vllm_mm_ext.tools.bench.inprocess import start
from vllm_mm_ext.tools.bench.kv_trace import record_accesses

TURNS = 4
BLOCK = 32
CONTEXT = 2560
FPS = 2
MAX_FRAMES = 32
SEGMENT_TOKENS = 512
CONFIG = {
    "mm_ext": {
        "media": {"sampling": {"fps": FPS, "max_frames": MAX_FRAMES}},
        "segments": {"tokens": SEGMENT_TOKENS},
    }
}
# Text prompts between two turns, and words in each.
CHURN = 2
WORDS = 120
# Tokens of the video of one conversation, 10 s of 448 x 224 pixels; and about its text.
VIDEO_TOKENS = 1280
_TEXT_TOKENS = 150


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        conversation: Its number.
        turn: From 1.
        prompt: Prompt tokens.
        media: Prompt tokens up to the end of the video.
        cached: How many of those the prefix cache held.
        encoded: Tokens that went through the encoder.
        answer: Token ids.
    """

    conversation: int
    turn: int
    prompt: int
    media: int
    cached: int
    encoded: int
    answer: tuple[int, ...]


def kv_blocks(conversations: int) -> int:
    """KV blocks for half of so many conversations."""
    return conversations * (VIDEO_TOKENS + _TEXT_TOKENS) // (2 * BLOCK)


def schedule(conversations: int, turns: int = TURNS) -> Iterator[tuple[int, int]]:
    """Conversation and turn: in every round all conversations, in random order."""
    rng = random.Random(1)
    for turn in range(1, turns + 1):
        for number in rng.sample(range(conversations), conversations):
            yield number, turn


def churn(number: int) -> str:
    """A text prompt like no other."""
    rng = random.Random(number)
    return " ".join(str(rng.randrange(10**6)) for _ in range(WORDS))


def play(llm: Any, videos: list[Path], turns: int = TURNS) -> list[Turn]:
    """All conversations, one request at a time, with text prompts between them."""
    played = []
    for number, turn in schedule(len(videos), turns):
        played.append(_turn(llm, videos[number], number, turn))
        for _ in range(CHURN):
            _generate(llm, churn(len(played) * CHURN + _))
    return played


def cold(llm: Any, videos: list[Path], turns: list[Turn]) -> list[tuple[int, ...]]:
    """The answers to the same questions with nothing cached."""
    answers = []
    for each in turns:
        if not llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset")
        answers.append(_turn(llm, videos[each.conversation], each.conversation, each.turn).answer)
    return answers


def _turn(llm: Any, video: Path, number: int, turn: int) -> Turn:
    messages: Any = conversation(video.as_uri(), turn)
    with record_steps(llm) as trace:
        (output,) = llm.chat(messages, _greedy(), use_tqdm=False)
    token = llm.llm_engine.model_config.hf_config.video_token_id
    ids = output.prompt_token_ids
    media = len(ids) - ids[::-1].index(token)
    return Turn(
        conversation=number,
        turn=turn,
        prompt=len(ids),
        media=media,
        cached=min(media, trace.work()[0].computed),
        encoded=sum(item.embeddings for item in trace.encoded()),
        answer=tuple(output.outputs[0].token_ids),
    )


def _generate(llm: Any, text: str) -> None:
    messages: Any = [{"role": "user", "content": f"{text} {QUESTIONS[0]}"}]
    llm.chat(messages, _greedy(), use_tqdm=False)


def _greedy() -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


def engine(model: Path, media: Path, conversations: int, **options: Any) -> Any:
    """An engine in this process with KV for half of the conversations."""
    return start(
        model,
        media,
        # So that answers do not depend on how a prompt was divided into steps.
        dtype="float32",
        block_size=BLOCK,
        num_gpu_blocks_override=kv_blocks(conversations),
        max_model_len=CONTEXT,
        limit_mm_per_prompt={"video": 1, "image": 0},
        media_io_kwargs={"video": {"fps": FPS, "max_frames": MAX_FRAMES}},
        **options,
    )


def main(side: str, model: Path, media: Path) -> None:
    """One side; prints the turns, and the trace of what they used."""
    videos = sorted(media.glob("*.mp4"))
    options = {"additional_config": CONFIG, **EVERY_PART} if side == "plugin" else {}
    llm = engine(model, media, len(videos), **options)
    with record_accesses(llm) as recorder:
        turns = [asdict(turn) for turn in play(llm, videos)]
    print(json.dumps({"turns": turns, "trace": recorder.trace().text("conversations")}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
