"""What a session wants done after an event: events to send, work for the engine, a close."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_mm_ext.live.prompt import Prompt


@dataclass(frozen=True, slots=True)
class Send:
    """Send a server event; the codec adds ``event_id``."""

    event: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Append:
    """Let the engine compute what of an open prompt it has not computed yet.

    A newer ``Append`` takes the place of one that has not begun, and so does a ``Respond`` of the
    conversation. The machine is told of the end by ``appended``.

    Attributes:
        prompt: Open, or closed where an answer is likely to be asked for as it stands.
        pause: Names the pause in speech of which the chance is wanted that it ends the turn; None:
            no chance is wanted.
    """

    prompt: Prompt
    pause: int | None = None


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """What the model says of a pause in speech.

    Attributes:
        pause: As the ``Append`` names it.
        chance: From 0 to 1, that it ends the turn.
    """

    pause: int
    chance: float


@dataclass(frozen=True, slots=True)
class ResponseOptions:
    """How a response is written.

    Attributes:
        max_output_tokens: None: as many as fit.
        temperature: None: the server's default.
    """

    max_output_tokens: int | None
    temperature: float | None


@dataclass(frozen=True, slots=True)
class Respond:
    """Let the engine answer a closed prompt; the machine is told by ``wrote``, then ``ended``.

    Attributes:
        response_id: Names the response.
        prompt: What is answered.
        options: How.
        aside: The prompt is not the conversation as the next append continues it.
        in_conversation: The answer becomes an item, before all that is appended later.
    """

    response_id: str
    prompt: Prompt
    options: ResponseOptions
    aside: bool = False
    in_conversation: bool = True


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop a response; nothing more of it may reach the machine."""

    response_id: str


@dataclass(frozen=True, slots=True)
class Close:
    """Send what is to be sent, then close the socket with a WebSocket close code and a reason."""

    code: int
    reason: str


Effect = Send | Append | Respond | Abort | Close


def sends(events: Iterable[Mapping[str, Any]]) -> list[Effect]:
    """Effects that send events, in order."""
    return [Send(event) for event in events]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one response.

    Attributes:
        input_tokens: Of the prompt.
        cached_tokens: Of these, those found in KV.
        output_tokens: Written.
        audio_tokens: Of the prompt, those of sound.
        image_tokens: Of the prompt, those of frames and pictures.
    """

    input_tokens: int
    cached_tokens: int
    output_tokens: int
    audio_tokens: int
    image_tokens: int
