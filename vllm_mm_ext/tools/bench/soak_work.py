"""What clients ask in a soak: conversations drawn at random from a seed.

Which bytes a new clip has follows from how many were made before it, so between two servers of
different speed these differ; kinds, options and order of each client's conversations do not.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from vllm_mm_ext.tools.bench.chat import messages_about, video_part
from vllm_mm_ext.tools.bench.soak_media import SoakMedia

Leaves = Literal["never", "after a token", "before the answer"]


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        kind: What it is counted as.
        body: What the OpenAI client is given beside the model.
        leaves: When its client hangs up.
        must_answer: It is right as it stands; False: the server may refuse it (4xx).
    """

    kind: str
    body: dict[str, Any]
    leaves: Leaves = "never"
    must_answer: bool = True


@contextmanager
def conversation(media: SoakMedia, rng: random.Random) -> Iterator[list[Question]]:
    """The questions of one conversation, to be asked in their order within the block."""
    kind = rng.choices(tuple(_KINDS), [weight for weight, _ in _KINDS.values()])[0]
    if kind in ("new clip", "new clip, client hangs up"):
        with media.new(rng) as url:
            yield _about(kind, url, media, rng)
    else:
        yield _about(kind, media.known(rng), media, rng)


def _about(kind: str, url: str, media: SoakMedia, rng: random.Random) -> list[Question]:
    _, make = _KINDS[kind]
    session = {"session_id": _name(rng)} if rng.random() < 0.5 else {}
    found = []
    for question in make(url, media, rng):
        extra = {"extra_body": session | question.body.get("extra_body", {})}
        found.append(replace(question, kind=kind, body=_answer(rng) | question.body | extra))
    return found


def _turns(url: str, _: SoakMedia, rng: random.Random) -> list[Question]:
    """Up to three turns about a clip, with options that may change from turn to turn."""
    options = _options(rng)
    found = []
    for turn in range(1, rng.randint(1, 3) + 1):
        if rng.random() < 0.2:
            options = _options(rng)
        body = {"messages": messages_about([video_part(url)], turn)}
        found.append(Question("", body | ({"extra_body": {"mm_ext": options}} if options else {})))
    return found


def _named(url: str, _: SoakMedia, rng: random.Random) -> list[Question]:
    """A clip with a name of the client's; the second turn may send the name alone."""
    name = _name(rng)
    first = video_part(url, uuid=name)
    alone = video_part(None, uuid=name)
    # What a server has forgotten, it must be sent again.
    return [
        Question("", {"messages": messages_about([first], 1)}),
        Question("", {"messages": messages_about([alone], 2)}, must_answer=False),
    ]


def _several(url: str, media: SoakMedia, rng: random.Random) -> list[Question]:
    """A clip, a picture and a sound in one message."""
    picture = {"type": "image_url", "image_url": {"url": media.picture(rng)}}
    sound = {"type": "audio_url", "audio_url": {"url": media.sound(rng)}}
    return [Question("", {"messages": messages_about([video_part(url), picture, sound], 1)})]


def _damaged(_: str, media: SoakMedia, rng: random.Random) -> list[Question]:
    body = {"messages": messages_about([video_part(media.damaged(rng))], 1)}
    return [Question("", body, must_answer=False)]


def _left(url: str, _: SoakMedia, rng: random.Random) -> list[Question]:
    """A question whose client hangs up, and the same once more."""
    leaves: Leaves = rng.choice(("after a token", "before the answer"))
    body = {"messages": messages_about([video_part(url)], 1), "stream": True, "max_tokens": 64}
    return [Question("", body, leaves), Question("", body)]


def _refused(url: str, _: SoakMedia, rng: random.Random) -> list[Question]:
    body = {"messages": messages_about([video_part(url)], 1)}
    bad = rng.choice(({"fps": -1}, {"total_tokens": 1}, {"unknown": 1}))
    return [Question("", body | {"extra_body": {"mm_ext": bad}}, must_answer=False)]


def _text(_: str, __: SoakMedia, rng: random.Random) -> list[Question]:
    words = " ".join(str(rng.randrange(1000)) for _ in range(rng.randint(4, 64)))
    return [Question("", {"messages": [{"role": "user", "content": words}]})]


_KINDS: dict[str, tuple[float, Callable[[str, SoakMedia, random.Random], list[Question]]]] = {
    "new clip": (6, _turns),
    "known clip": (6, _turns),
    "named by the client": (2, _named),
    "clip, picture and sound": (2, _several),
    "damaged clip": (2, _damaged),
    "known clip, client hangs up": (1, _left),
    "new clip, client hangs up": (1, _left),
    "bad option": (1, _refused),
    "text": (2, _text),
}


def _name(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128)))


def _answer(rng: random.Random) -> dict[str, Any]:
    stream = rng.random() < 0.5
    more = {"stream_options": {"include_usage": True}} if stream and rng.random() < 0.5 else {}
    return {"max_tokens": rng.choice((1, 4, 16)), "temperature": 0, "stream": stream, **more}


def _options(rng: random.Random) -> dict[str, Any]:
    """An ``mm_ext`` block; frame rates differ, so that the frames chosen of one clip do."""
    choices: dict[str, Any] = {
        "fps": rng.uniform(0.5, 4.0),
        "max_frames": rng.choice((4, 8, 16)),
        "resolution": rng.choice((56, 112, 168, 224)),
        "total_tokens": rng.choice((1024, 2048, 4096)),
        "quality": "fixed",
        "reduction": rng.choice(
            (
                {"pool": 2},
                {"temporal": 2},
                {"static": "merge", "keep": 0.5},
                {"static": "prune", "keep": rng.choice((0.25, 0.5, 0.75))},
            )
        ),
    }
    return {name: choices[name] for name in rng.sample(list(choices), rng.randint(0, 3))}
