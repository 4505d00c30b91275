"""What a strategy asks of the model, and what the model replies: plain values, no engine.

A strategy (``rolling``, ``map_reduce``, ``search``) is written against ``Model``. The one that
serves is ``adapters/long_video/``; tests have models that answer from a table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True)
class Window:
    """A span of one video that the model is shown at once.

    Attributes:
        video: Number of the video among those of the conversation, from 0.
        number: Number of the window within its video, from 0.
        start, end: Seconds on the picture's clock; ``end`` is not part of the window.
    """

    video: int
    number: int
    start: float
    end: float


@dataclass(frozen=True)
class Look:
    """How closely the model looks at a window.

    Attributes:
        kind: ``note``: as asked. ``coarse``: few frames, for a first look at every window.
            ``close``: many frames, for a second look at few windows.
        fps: Frames per second; None as the server samples.
        max_frames: Most frames of the window; None as the server samples.
    """

    kind: Literal["note", "coarse", "close"]
    fps: float | None = None
    max_frames: int | None = None


@dataclass(frozen=True)
class Ask:
    """One prompt: a window, or none, and the texts that follow it.

    Attributes:
        window: What the model is shown before the texts; None for a prompt of text alone.
        look: How closely, where there is a window.
        texts: Texts in their order. What stays the same between prompts about a window comes
            first, so that the prefix cache holds it.
        max_tokens: Most tokens of the reply.
        choices: With choices the model is not to write but to choose: the reply has the probability
            of each of them (as the first token of a reply), and no text.
    """

    window: Window | None
    look: Look | None
    texts: tuple[str, ...]
    max_tokens: int
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    """What replies took.

    Attributes:
        prompt_tokens: Tokens of the prompts.
        cached_tokens: Those of them that the prefix cache held.
        completion_tokens: Tokens written.
        seconds: From sending a prompt to its reply.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that no cache held, and the tokens written."""
        return self.prompt_tokens - self.cached_tokens + self.completion_tokens

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Reply:
    """What the model replied to one prompt.

    Attributes:
        text: What it wrote; empty with choices.
        chances: Probability of each choice, 0 to 1.
        cost: What the reply took.
        activity: Of a reply about a window: how much happens in the window, 0 to 1, as the sampler
            saw it; None where the sampling policy does not look.
    """

    text: str
    chances: Mapping[str, float] = field(default_factory=dict)
    cost: Cost = Cost()
    activity: float | None = None


class AskFailedError(Exception):
    """A prompt was tried twice and got no reply; the message says why, in words for the client."""


def filled(prompt: str, **values: str) -> str:
    """A prompt of the settings with values in its places, as in ``{question}``.

    Braces of the prompt that name no value stay, as do those within values.
    """
    return re.sub(r"\{(\w+)\}", lambda place: values.get(place[1], place[0]), prompt)


class Model(Protocol):
    """A model that can be asked many things at once, each an ordinary request to the engine."""

    @property
    def context_tokens(self) -> int:
        """Most tokens of a prompt and its reply together."""

    @property
    def identity(self) -> str:
        """What replies depend on besides the prompt: the model, its weights, the cache salt."""

    async def ask(self, ask: Ask) -> Reply:
        """Send one prompt. Those who ask bound how many are under way.

        Raises:
            AskFailedError: The prompt failed twice.
        """

    async def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without what a chat template adds."""

    async def window_key(self, window: Window, look: Look) -> str:
        """Digest of what the model is shown of a window: its frames, their times and its sound.

        It does not depend on the file around the window, so a recording that has grown at its end
        has the same windows before. The window is decoded where it is not known yet.

        Raises:
            AskFailedError: The window cannot be read.
        """

    def may_keep(self, window: Window) -> bool:
        """Whether replies about a window may be kept for later requests."""

    def known_window_key(self, window: Window, look: Look) -> str | None:
        """The same digest where it is known without decoding, else None.

        None also where this request may not be told what earlier requests asked.
        """
