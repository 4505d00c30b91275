"""Prompts of sessions as token ids and media, as vLLM's renderer takes them."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachetools import LRUCache

from vllm_mm_ext.adapters.live.families import Family
from vllm_mm_ext.adapters.live.growing import GrowingStretch
from vllm_mm_ext.adapters.live.template_pieces import TemplatePieces
from vllm_mm_ext.adapters.processors.session_media import SessionMedia
from vllm_mm_ext.live.client_events import Role
from vllm_mm_ext.live.prompt import Generated, Message, Picture, Prompt, Stretch, Text
from vllm_mm_ext.request.placeholder_text import MARK, marked

# Characters and tokens of the texts that are remembered, for all sessions of the server together,
# and of the longest one of them.
_REMEMBERED = 1 << 21
_LONGEST = 1 << 18
# Begins the `uuid` of pictures, by which vLLM's caches know them. Clients may give media a `uuid`
# too, and cannot guess this one.
_PICTURES = f"mm_ext:live:{secrets.token_hex(16)}:"


class PromptError(Exception):
    """A conversation that the chat template has no form for; the message says why."""


class PromptMaker:
    """Makes prompts for the served model.

    Args:
        pieces: Its chat template.
        family: Its family.
        encode: Its tokenizer, without special tokens at the ends; called from several threads.
        token_texts: The token that stands for a medium, by modality.
        placeholders: Tokens that no text of a client may become.
    """

    def __init__(
        self,
        pieces: TemplatePieces,
        family: Family,
        encode: Callable[[str], Sequence[int]],
        token_texts: Mapping[str, str],
        placeholders: Sequence[str],
    ) -> None:
        self._pieces = pieces
        self.family = family
        self.token_texts = token_texts
        self._encode = encode
        self._placeholders = placeholders
        # What stands before and after the token of each medium.
        self._around = {
            kind: pieces.media[kind].split(token) for kind, token in token_texts.items()
        }
        # Prompts are measured on the event loop and made in a thread.
        self._lock = threading.Lock()
        self._known: LRUCache[str, _Known] = LRUCache(_REMEMBERED, getsizeof=lambda one: one.size)

    def measure(self, message: Message) -> int:
        """Prompt tokens of a message with those around it, a few more or less.

        What stands around an answer counts with the user's message before it.
        """
        family, pieces, count = self.family, self._pieces, 0
        if message.role == "user":
            around = pieces.between["assistant", "user"] + pieces.asking["user"]
            count = len(self._tokens(around))
        elif message.role == "system":
            count = len(self._tokens(pieces.first.get("system", "")))
        texts = self._texts(message)
        for index, part in enumerate(message.parts):
            if isinstance(part, Text):
                count += sum(len(self._tokens(text)) for text in texts[index].split(MARK))
            elif isinstance(part, Generated):
                count += len(part.token_ids)
            else:
                kind = _modality(part)
                count += len(self._tokens("".join(self._around[kind])))
                if isinstance(part, Picture):
                    count += family.tokens_of_picture(part)
                else:
                    count += family.tokens_of(part)
        return count

    def make(self, prompt: Prompt, stretches: dict[str, GrowingStretch]) -> dict[str, Any]:
        """The prompt as vLLM's ``TokensPrompt``.

        Args:
            prompt: The conversation.
            stretches: What was made of the session's stretches before, by their ids; becomes what
                this prompt has.

        Raises:
            PromptError: The chat template has no form for such a conversation.
        """
        made = _Made(self._tokens)
        self._drop_old(prompt, stretches)
        previous: Role | None = None
        for message in prompt.messages:
            is_open = prompt.open and message is prompt.messages[-1]
            made.text(self._before(previous, message.role))
            self._contents(made, message, is_open, stretches)
            previous = message.role
        if not prompt.open:
            if previous is None:
                raise PromptError("the conversation is empty")
            if previous not in self._pieces.asking:
                raise PromptError(f"the chat template asks for no answer to {previous}")
            made.text(self._pieces.asking[previous])
        return made.prompt()

    def _before(self, previous: Role | None, role: Role) -> str:
        pieces = self._pieces
        text = pieces.first.get(role) if previous is None else pieces.between.get((previous, role))
        if text is None:
            raise PromptError(
                f"the chat template allows no message of {role} "
                + ("at the beginning" if previous is None else f"after one of {previous}")
            )
        return text

    def _drop_old(self, prompt: Prompt, stretches: dict[str, GrowingStretch]) -> None:
        shown = {
            part.stretch_id
            for message in prompt.messages
            for part in message.parts
            if isinstance(part, Stretch)
        }
        for name in stretches.keys() - shown:
            del stretches[name]

    def _contents(
        self,
        made: _Made,
        message: Message,
        is_open: bool,
        stretches: dict[str, GrowingStretch],
    ) -> None:
        texts, pieces = self._texts(message), self._pieces
        parts = list(enumerate(message.parts))
        if pieces.media_first:
            parts.sort(key=lambda one: not isinstance(one[1], Picture | Stretch))
        for place, (index, part) in enumerate(parts):
            beside = pieces.media_first and isinstance(parts[place - 1][1], Picture | Stretch)
            if place and not beside and not _goes_on(message, index):
                made.text(pieces.separator)
            last = is_open and place == len(parts) - 1
            if isinstance(part, Text):
                made.text(texts[index])
            elif isinstance(part, Generated):
                made.ids(part.token_ids)
            elif isinstance(part, Picture):
                self._placed(made, "image", 1, ends=True)
                made.add("image", part.image, f"{_PICTURES}{part.digest}")
            else:
                self._stretch(made, part, stretches, ends=not last)

    def _texts(self, message: Message) -> dict[int, str]:
        """Texts of a message by index, with marks where they read like placeholders."""
        if not any(isinstance(part, Text) for part in message.parts):
            return {}
        parts = [
            {"type": "text", "text": part.text.replace(MARK, "")}
            if isinstance(part, Text)
            else {"type": "other"}
            for part in message.parts
        ]
        (found,) = marked([{"content": parts}], self._placeholders)
        made = {i: part["text"] for i, part in enumerate(found["content"]) if "text" in part}
        if self._pieces.trims:
            made = {
                i: text.rstrip() if _goes_on(message, i) else text.strip()
                for i, text in made.items()
            }
        return made

    def _stretch(
        self, made: _Made, part: Stretch, stretches: dict[str, GrowingStretch], *, ends: bool
    ) -> None:
        family = self.family
        if part.stretch_id not in stretches:
            stretches[part.stretch_id] = GrowingStretch(
                family.traits.unit_s,
                family.reduction,
                None if family.new_sound is None else family.new_sound(),
            )
        media = stretches[part.stretch_id].media(part)
        if media.video is not None:
            self._placed(made, "video", 1, ends=ends)
            made.add("video", media.video)
        elif media.sounds:
            self._placed(made, "audio", len(media.sounds), ends=ends)
            for sound in media.sounds:
                made.add("audio", sound)

    def _placed(self, made: _Made, kind: str, count: int, *, ends: bool) -> None:
        before, after = self._around[kind]
        made.text(before)
        made.ids([self.family.token_ids[kind]] * count)
        if ends:
            made.text(after)

    def _tokens(self, text: str) -> tuple[int, ...]:
        with self._lock:
            known = self._known.get(text)
        if known is None:
            ids = tuple(self._encode(text))
            known = _Known(ids, len(text) + len(ids))
            if known.size <= _LONGEST:
                with self._lock:
                    self._known[text] = known
        return known.token_ids


@dataclass(frozen=True, slots=True)
class _Known:
    """The tokens of a text, and how much both are together."""

    token_ids: tuple[int, ...]
    size: int


class _Made:
    """A prompt being put together; texts that follow each other are tokenized as one."""

    def __init__(self, tokens: Callable[[str], Sequence[int]]) -> None:
        self._tokens = tokens
        self._ids: list[int] = []
        self._run: list[str] = []
        self._data: dict[str, list[Any]] = {}
        self._names: dict[str, list[str | None]] = {}

    def text(self, text: str) -> None:
        self._run.append(text)

    def ids(self, ids: Sequence[int]) -> None:
        self._flush()
        self._ids += ids

    def add(self, kind: str, item: Any, name: str | None = None) -> None:
        self._data.setdefault(kind, []).append(item)
        self._names.setdefault(kind, []).append(name)

    def prompt(self) -> dict[str, Any]:
        self._flush()
        made: dict[str, Any] = {"prompt_token_ids": self._ids}
        if self._data:
            made["multi_modal_data"] = SessionMedia(self._data)
            made["multi_modal_uuids"] = self._names
        return made

    def _flush(self) -> None:
        for text in "".join(self._run).split(MARK):
            if text:
                self._ids += self._tokens(text)
        self._run = []


def _goes_on(message: Message, index: int) -> bool:
    """Whether a part is the rest of an answer that was cut within a token."""
    parts = message.parts
    return index > 0 and isinstance(parts[index], Text) and isinstance(parts[index - 1], Generated)


def _modality(part: Picture | Stretch) -> str:
    if isinstance(part, Picture):
        return "image"
    return "video" if part.units[0].frames else "audio"
