"""What ``vllm-mm live`` prints while a session runs: who spoke when, answers, and latencies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from vllm_mm_ext.tools.cli.common import clock, printable
from vllm_mm_ext.tools.cli.live_client import LiveAnswer, LiveSession


class Captions:
    """Prints a session's events as they come, each with the time of the media.

    Args:
        console: Where to print.

    Attributes:
        speaking: The server hears speech, or has just heard it end and has not answered yet.
        after_speech_s: Seconds from the end of each turn's speech to the first text.
    """

    def __init__(self, console: Console) -> None:
        self.speaking = False
        self.after_speech_s: list[float] = []
        self._console = console
        self._began = time.perf_counter()
        self._speech_ms = 0
        # When the speech that is being answered ended, on the clock of ``perf_counter``.
        self._speech_end: float | None = None
        self._open = ""

    def start(self) -> None:
        """Sound and pictures begin now."""
        self._began = time.perf_counter()

    def asked(self, text: str) -> None:
        """A question was asked in writing."""
        self._line(time.perf_counter(), f"[cyan]asked[/] {escape(printable(text))}")

    def event(self, session: LiveSession, event: Mapping[str, Any], now: float) -> None:
        """Print an event of the server that came at ``now``."""
        match event.get("type"):
            case "input_audio_buffer.speech_started":
                self.speaking = True
                self._speech_ms = event["audio_start_ms"]
            case "input_audio_buffer.speech_stopped":
                begin, end = self._speech_ms, event["audio_end_ms"] - session.silence_ms()
                self._speech_end = self._began + end / 1000
                self._line(now, f"[cyan]heard[/] {clock(begin / 1000)} - {clock(end / 1000)}")
            case "response.created":
                self.speaking = False
            case "response.output_text.delta":
                self._delta(session.answer(event["response_id"]), event["delta"], now)
            case "response.done":
                self._done(session.answer(event["response"]["id"]), now)
            case "conversation.item.deleted":
                self._line(now, "[dim]an item left the conversation[/]")
            case "error":
                message = escape(printable(str(event["error"].get("message"))))
                self._line(now, f"[red]error:[/] {message}")

    def _delta(self, answer: LiveAnswer, delta: str, now: float) -> None:
        if answer.first == now and self._speech_end is not None:
            self.after_speech_s.append(now - self._speech_end)
            self._speech_end = None
        if self._open != answer.response_id:
            self._line(now, "[green]model[/] ", end="")
            self._open = answer.response_id
        self._console.print(escape(printable(delta)), end="", highlight=False, soft_wrap=True)

    def _done(self, answer: LiveAnswer, now: float) -> None:
        if self._open == answer.response_id:
            self._console.print()
            self._open = ""
        if answer.status != "completed":
            words = f"{answer.status}: {answer.reason}" if answer.reason else answer.status
            self._line(now, f"[yellow]{escape(printable(words))}[/]")
        if answer.first is None:
            return
        written = "1 token" if answer.output_tokens == 1 else f"{answer.output_tokens} tokens"
        parts = [f"{written} in {_ms(now - answer.first)}"]
        if answer.first_token_s is not None:
            parts.insert(0, f"first token {_ms(answer.first_token_s)}")
        elif self.after_speech_s:
            parts.insert(0, f"first token {_ms(self.after_speech_s[-1])} after the speech")
        parts.append(f"prompt {answer.prompt_tokens:,}, {answer.cached_tokens:,} from KV")
        text = f"{' ' * 9}[dim]{'; '.join(parts)}[/]"
        self._console.print(text, highlight=False, soft_wrap=True)

    def _line(self, now: float, text: str, end: str = "\n") -> None:
        if self._open:
            self._console.print()
            self._open = ""
        second = clock(max(0.0, now - self._began))
        line = f"[dim]{second:>8}[/] {text}"
        self._console.print(line, end=end, highlight=False, soft_wrap=True)


def summary(answers: Sequence[LiveAnswer], after_speech_s: Sequence[float]) -> str:
    """One line about all answers of a session."""
    firsts = [one.first_token_s for one in answers if one.first_token_s is not None]
    parts = [f"{len(answers)} answers"]
    if firsts:
        parts.append(f"first token {_spread(firsts)}")
    if after_speech_s:
        parts.append(f"after the end of speech {_spread(after_speech_s)}")
    prompts = [one.prompt_tokens for one in answers if one.usage]
    if prompts:
        parts.append(f"last prompt {prompts[-1]:,} tokens")
    return "; ".join(parts)


def _spread(seconds: Sequence[float]) -> str:
    text = f"{_ms(statistics.median(seconds))} (median)"
    return text if len(seconds) < 2 else f"{text}, {_ms(max(seconds))} (most)"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
