"""What an engine step holds, as far as it decides how long the step takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from vllm_mm_ext.planner.request_tokens import RequestTokens


class EncoderWork(NamedTuple):
    """What encoders do for an mm item.

    Attributes:
        vision: Positions of the vision encoder.
        vision_pairs: Pairs of these that attend to each other.
        audio: Positions of the audio encoder.
    """

    vision: int
    vision_pairs: float
    audio: int


class RequestPart(NamedTuple):
    """What a step does for one request.

    Attributes:
        tokens: Tokens computed.
        before: Tokens before these.
        prompt: Tokens of the prompt.
        items: Work for the items encoded.
        inputs: In the request's first step, the encoder inputs of all its media: the engine hands
            them to its workers then, whether or not they will be encoded.
    """

    tokens: int
    before: int
    prompt: int
    items: Sequence[EncoderWork]
    inputs: int = 0


class StepContents(msgspec.Struct, frozen=True):
    """What a step holds.

    Attributes:
        decodes: Requests that decode.
        decode_context: Tokens that these attend to, in all.
        prompts: 1 if tokens of a prompt are computed, else 0.
        prefill: Tokens of prompts.
        pairs: Pairs of such a token and one that it attends to.
        encodes: 1 if anything is encoded, else 0.
        items: Items encoded.
        vision: Positions of the vision encoder.
        vision_pairs: Pairs of these that attend to each other.
        audio: Positions of the audio encoder.
        inputs: Encoder inputs of requests that begin.
    """

    decodes: int = 0
    decode_context: int = 0
    prompts: int = 0
    prefill: int = 0
    pairs: float = 0.0
    encodes: int = 0
    items: int = 0
    vision: int = 0
    vision_pairs: float = 0.0
    audio: int = 0
    inputs: int = 0


def encoder_work(request: RequestTokens) -> tuple[EncoderWork, ...]:
    """The work for each mm item of a request, in the order of the prompt."""
    works = []
    for medium in request.media:
        for item in medium.items:
            heard = item.encoder_inputs if item.modality == "audio" else item.audio_inputs
            seen = item.encoder_inputs - heard
            works.append(EncoderWork(seen, float(seen * medium.picture_inputs), heard))
    return tuple(works)


def step_contents(parts: Iterable[RequestPart]) -> StepContents:
    """What a step holds that does these for its requests."""
    decodes = context = prefill = inputs = 0
    pairs = 0.0
    items: list[EncoderWork] = []
    for part in parts:
        if part.before < part.prompt:
            prefill += part.tokens
            pairs += part.tokens * (part.before + part.tokens / 2)
        else:
            decodes += 1
            context += part.before
        items += part.items
        inputs += part.inputs
    return StepContents(
        decodes,
        context,
        int(prefill > 0),
        prefill,
        pairs,
        int(bool(items)),
        len(items),
        sum(item.vision for item in items),
        sum(item.vision_pairs for item in items),
        sum(item.audio for item in items),
        inputs,
    )


def inputs_of(works: Iterable[EncoderWork]) -> int:
    """Encoder inputs of all items of a request."""
    return sum(work.vision + work.audio for work in works)
