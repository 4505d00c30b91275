"""The chat template of the served model in pieces, of which prompts of sessions are put together.

A session's prompt is made of token ids, since what the model wrote must go back by the very tokens
that it wrote. So the template is rendered once with markers in place of all texts, and what stands
between the markers is used from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, get_args

from vllm_mm_ext.live.client_events import Role
from vllm_mm_ext.live.reasoning import BEGIN, END

# Renders messages of an OpenAI conversation; the second argument asks for an answer.
Render = Callable[[Sequence[Mapping[str, Any]], bool], str]

_MARKERS = tuple(f"mmext{number}mark" for number in range(5))
_TURNS: tuple[Role, ...] = ("user", "assistant", "user", "assistant", "user")


class TemplateError(Exception):
    """A chat template cannot be taken apart; the message says why."""


@dataclass(frozen=True)
class TemplatePieces:
    """Text of a chat template around the contents of messages.

    Attributes:
        first: Before the content of a conversation's first message, by its role.
        between: After the content of a message and before that of the next, by both roles.
        asking: After the content of the last message, by its role, where an answer is asked for.
        separator: Between two texts of a message, and beside its media unless they come first.
        media: What stands for a medium, by modality; it has the modality's token once.
        media_first: A message's media stand before all its texts.
        trims: White space around texts is left out.
        opens_reasoning: What is written after ``asking`` begins with reasoning.
    """

    first: Mapping[Role, str]
    between: Mapping[tuple[Role, Role], str]
    asking: Mapping[Role, str]
    separator: str
    media: Mapping[str, str]
    media_first: bool
    trims: bool
    opens_reasoning: bool


def take_apart(render: Render, tokens: Mapping[str, str]) -> TemplatePieces:
    """Take a chat template apart.

    Args:
        render: Applies the template.
        tokens: The token that stands for a medium, by modality.

    Raises:
        TemplateError: The template does not treat all turns alike, or a medium does not become one
            token between fixed texts.
    """
    talk = [_message(role, text) for role, text in zip(_TURNS, _MARKERS, strict=True)]
    first: dict[Role, str] = {}
    between: dict[tuple[Role, Role], str] = {}
    asking: dict[Role, str] = {}
    for length in (5, 3, 1):
        try:
            rendered = render(talk[:length], True)
        except Exception as error:
            raise TemplateError(
                f"the chat template takes no turns of user and assistant: {error}"
            ) from error
        edges, roles = _between_markers(rendered, _MARKERS[:length]), _TURNS[:length]
        _put(first, roles[0], edges[0], "before the first message")
        _put(asking, roles[-1], edges[-1], "after the last message")
        for pair, text in zip(pairwise(roles), edges[1:-1], strict=True):
            _put(between, pair, text, f"between messages of {pair[0]} and {pair[1]}")
    # Turns that conversations may have but templates may refuse.
    for one, other in product(get_args(Role), repeat=2):
        with suppress(Exception):
            some = [_message(one, _MARKERS[0]), _message(other, _MARKERS[1])]
            edges = _between_markers(render(some, True), _MARKERS[:2])
            first.setdefault(one, edges[0])
            between.setdefault((one, other), edges[1])
            asking.setdefault(other, edges[2])
    separator = _user(render, _text(0), _text(1))[1]
    spaced = render([_message("user", f" {_MARKERS[0]} ")], True)
    around = first["user"], asking["user"]
    media, places = {}, set()
    for kind, token in tokens.items():
        media[kind], leads = _medium(render, kind, token, separator, around)
        places.add(leads)
    if len(places) > 1:
        raise TemplateError("the chat template puts some media before all texts, and others not")
    return TemplatePieces(
        first,
        between,
        asking,
        separator,
        media,
        media_first=True in places,
        trims=f" {_MARKERS[0]} " not in spaced,
        opens_reasoning=asking["user"].rfind(BEGIN) > asking["user"].rfind(END),
    )


def _medium(
    render: Render, kind: str, token: str, separator: str, around: tuple[str, str]
) -> tuple[str, bool]:
    """What stands for a medium, and whether it stands before all texts of its message."""
    one = _user(render, _text(0), {"type": kind}, _text(1))
    two = _user(render, _text(0), {"type": kind}, {"type": kind}, _text(1))
    leads = one[1] == separator and token in one[0]
    if leads:
        medium = one[0].removeprefix(around[0])
        alone = render([{"role": "user", "content": [{"type": kind}]}], True)
        fits = two[0] == around[0] + 2 * medium and alone == medium.join(around)
    else:
        medium = one[1].removeprefix(separator).removesuffix(separator)
        fits = two[1] == separator.join(["", medium, medium, ""])
    if medium.count(token) != 1 or not fits:
        raise TemplateError(
            f"the chat template makes {one} of one {kind} between two texts and {two} of two; it "
            f"must make one text with the token {token!r} of each"
        )
    return medium, leads


def _user(render: Render, *parts: Mapping[str, Any]) -> list[str]:
    """What stands around the first two markers in a user's message of these parts."""
    return _between_markers(render([{"role": "user", "content": list(parts)}], True), _MARKERS[:2])


def _text(number: int) -> dict[str, str]:
    return {"type": "text", "text": _MARKERS[number]}


def _message(role: Role, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _between_markers(rendered: str, markers: Sequence[str]) -> list[str]:
    edges = []
    for marker in markers:
        before, found, rendered = rendered.partition(marker)
        if not found:
            raise TemplateError("the chat template leaves out or reorders text of messages")
        edges.append(before)
    if any(marker in text for text in (*edges, rendered) for marker in _MARKERS):
        raise TemplateError("the chat template repeats text of messages")
    return [*edges, rendered]


def _put(table: dict[Any, str], key: Any, text: str, where: str) -> None:
    if table.setdefault(key, text) != text:
        raise TemplateError(
            f"the chat template writes {table[key]!r} or {text!r} {where}, depending on the turn"
        )
