"""A model that knows recordings with planted events, for tests of long video without an engine."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from vllm_mm_ext.long_video.asking import Ask, AskFailedError, Cost, Look, Reply, Window

_TOKEN = re.compile(r"[A-Za-z]+|\d|[^\w\s]")


def count(text: str) -> int:
    """Tokens of a text: words, digits and signs. Joined texts never have more than the parts."""
    return len(_TOKEN.findall(text))


@dataclass
class SimulatedModel:
    """Tells the events of recordings, chooses by a word of the question, copies notes that hold it.

    Attributes:
        events: Time and text of the events of each recording.
        word: What questions are about: a window matters if an event in it holds the word.
        misses: Part of the events that notes leave out.
        noise: How far relevances are off, 0 to 1.
        select: Replies to prompts without a window; None copies the entries that hold the word.
        fails: Whether the model fails on a window.
        fails_on_text: Whether it fails on prompts without a window.
        delays: Turns of the event loop until a reply; 0 for some turns, other ones for each ask.
        may_be_kept: Replies may be kept for later requests.
        context_tokens: Most tokens of a prompt of text and its reply; more is an AssertionError.
    """

    events: Sequence[Sequence[tuple[float, str]]]
    word: str = "blue flash"
    misses: float = 0.0
    noise: float = 0.0
    select: Callable[[str], str] | None = None
    fails: Callable[[Window], bool] = lambda _: False
    fails_on_text: bool = False
    may_be_kept: bool = True
    context_tokens: int = 4096
    identity: str = "simulated"
    seed: int = 0
    delays: int = 0
    asks: list[Ask] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    known: dict[tuple[Window, Look], str] = field(default_factory=dict)

    async def ask(self, ask: Ask) -> Reply:
        self.asks.append(ask)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            for _ in range(self.delays or random.Random(f"{self.seed} {ask}").randrange(5)):
                await asyncio.sleep(0)
            return self._reply(ask)
        finally:
            self.under_way -= 1

    async def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [count(text) for text in texts]

    async def window_key(self, window: Window, look: Look) -> str:
        shown = [(time - window.start, text) for time, text in self._shown(window)]
        key = self.known[window, look] = repr((window.end - window.start, look, shown))
        return key

    def may_keep(self, window: Window) -> bool:
        del window
        return self.may_be_kept

    def known_window_key(self, window: Window, look: Look) -> str | None:
        return self.known.get((window, look))

    def _shown(self, window: Window) -> list[tuple[float, str]]:
        return [e for e in self.events[window.video] if window.start <= e[0] < window.end]

    def _reply(self, ask: Ask) -> Reply:
        text = sum(count(part) for part in ask.texts)
        if ask.window is None or ask.look is None:
            assert text + ask.max_tokens <= self.context_tokens, f"{text} + {ask.max_tokens} tokens"
            if self.fails_on_text:
                raise AskFailedError("the prompt failed")
            reply = (self.select or self._copied)(ask.texts[0])
            if count(reply) > ask.max_tokens:
                cut = next(islice(_TOKEN.finditer(reply), ask.max_tokens, None))
                reply = reply[: cut.start()]
            return Reply(reply, cost=Cost(text, 0, count(reply), 0.1))
        if self.fails(ask.window):
            raise AskFailedError(f"window {ask.window.number} cannot be read")
        seconds = ask.window.end - ask.window.start
        frames = min(seconds * (ask.look.fps or 2), ask.look.max_frames or 1000)
        cost = Cost(text + int(frames * 10), 0, 1, 0.1)
        shown = self._shown(ask.window)
        chance = random.Random(f"{self.seed} {ask.window} {ask.look.kind}")
        if ask.choices:
            yes = 0.85 if any(self.word in what for _, what in shown) else 0.05
            yes = min(max(yes + self.noise * chance.uniform(-1, 1), 0.001), 0.999)
            chances = {ask.choices[0]: yes, ask.choices[1]: 1 - yes}
            return Reply("", chances, cost, activity=min(1.0, len(shown) / 10))
        told = [e for e in shown if chance.random() >= self.misses]
        note = "; ".join(f"[{int(time - ask.window.start)}] {what}" for time, what in told)
        return Reply(note, cost=cost)

    def _copied(self, prompt: str) -> str:
        notes = re.findall(r"\[\d+:\d\d:\d\d\] [^;\n]+", prompt)
        return "; ".join(note for note in notes if self.word in note)


def planted(seconds: float, every: float, seed: int = 0) -> list[tuple[float, str]]:
    """Events of a recording: flashes and tones somewhere, a scene each ``every`` seconds."""
    chance = random.Random(seed)
    scenes = [
        (float(at), f"{chance.choice(['red', 'green', 'white'])} circle {chance.choice('lr')}")
        for at in range(0, int(seconds), int(every))
    ]
    flashes = [
        (chance.uniform(0, seconds - 1), f"{colour} flash")
        for colour in ("blue", "blue", "blue", "yellow", "red")
    ]
    tones = [(chance.uniform(0, seconds - 1), f"high tone {g}, circle") for g in ("rise", "fall")]
    return sorted(scenes + flashes + tones)
