"""Timed chat requests against a running server."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_mm_ext.testing.server import Server

if TYPE_CHECKING:
    import openai

_TIMING = re.compile(r"mm_(\w+);dur=([\d.]+)")
QUESTIONS = (
    "What happens in this video?",
    "What comes first?",
    "What moves the most?",
    "How does it end?",
    "Anything else worth telling?",
)
# Fixed, so that both servers continue the same conversation whatever they answered.
REPLY = "There are shapes that move."


@dataclass(frozen=True)
class Answer:
    """One streamed answer.

    Attributes:
        ttft_s: Seconds from sending the request to the first token.
        total_s: Seconds to the last token.
        prompt_tokens: Length of the prompt, media included.
        cached_tokens: How much of it came from the prefix cache, where the server tells
            (``--enable-prompt-tokens-details``), else 0.
        stages: The front-end's own stage times in seconds (``Server-Timing``); empty for stock.
        report: The answer's own ``mm_ext`` block; empty for stock.
        text: The answer.
        model: Name of the model that answered, as the server calls it.
    """

    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    stages: Mapping[str, float]
    report: Mapping[str, Any]
    text: str
    model: str = ""


def ask(
    server: Server,
    messages: Sequence[Mapping[str, Any]],
    *,
    max_tokens: int = 4,
    options: Mapping[str, Any] | None = None,
    session: str | None = None,
    ignore_end: bool = True,
    client: openai.OpenAI | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Send one streaming chat request and time it.

    Args:
        server: Who is asked.
        messages: OpenAI chat messages.
        max_tokens: Tokens of the answer at most.
        options: The request's ``mm_ext`` block; None sends none.
        session: Its session id; None sends none.
        ignore_end: All of ``max_tokens`` are generated, whatever the model would say.
        client: For many requests; None: one of its own, which takes tens of milliseconds.
        headers: More headers of the request.

    Raises:
        openai.APIError: The server refused or failed.
        RuntimeError: The answer held no token.
    """
    # Plain dictionaries: the client's typed message parameters add nothing here.
    body: Any = list(messages)
    extra: dict[str, Any] = {"ignore_eos": ignore_end}
    extra |= {"mm_ext": options} if options else {}
    extra |= {"session_id": session} if session is not None else {}
    with contextlib.ExitStack() as stack:
        client = client or stack.enter_context(server.client(timeout=600.0))
        started = time.perf_counter()
        response = client.chat.completions.with_raw_response.create(
            model=server.model,
            messages=body,
            max_tokens=max_tokens,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
            extra_headers=headers,
        )
        first: float | None = None
        prompt_tokens = cached_tokens = 0
        report: Mapping[str, Any] = {}
        text = model = ""
        for chunk in response.parse():
            # vLLM sends its first chunk when the first token is there.
            if first is None and chunk.choices:
                first = time.perf_counter()
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            if chunk.usage is not None:
                prompt_tokens = chunk.usage.prompt_tokens
                details = chunk.usage.prompt_tokens_details
                cached_tokens = (details.cached_tokens if details else None) or 0
            report = (chunk.model_extra or {}).get("mm_ext", report)
            model = chunk.model
        ended = time.perf_counter()
    if first is None:
        raise RuntimeError("the server answered without a token")
    header = response.headers.get("server-timing", "")
    stages = {name: float(ms) / 1e3 for name, ms in _TIMING.findall(header)}
    return Answer(
        first - started, ended - started, prompt_tokens, cached_tokens, stages, report, text, model
    )


def conversation(video_url: str, turn: int) -> list[dict[str, Any]]:
    """The messages of turn ``turn`` (from 1): the video in the first, a question in each."""
    return messages_about([video_part(video_url)], turn)


def messages_about(media: Sequence[Mapping[str, Any]], turn: int) -> list[dict[str, Any]]:
    """The messages of turn ``turn`` (from 1): parts ``media`` in the first, a question in each."""
    messages: list[dict[str, Any]] = []
    for number in range(turn):
        question = {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}
        parts = [*media, question] if number == 0 else [question]
        messages.append({"role": "user", "content": parts})
        if number < turn - 1:
            messages.append({"role": "assistant", "content": REPLY})
    return messages


def video_part(url: str | None, **more: Any) -> dict[str, Any]:
    """The part of a message that shows a video; ``more`` are further fields of the part."""
    return {"type": "video_url", "video_url": None if url is None else {"url": url}, **more}
