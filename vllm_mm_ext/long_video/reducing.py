"""Fits notes into the prompt of the answer: the model copies what matters, group by group.

No prompt and no result is larger than it may be. Whatever the model replies, it ends: a round that
leaves most of the notes is the last one, and then notes are left out evenly over the video.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_mm_ext.long_video.asking import Ask, Model, Reply, filled
from vllm_mm_ext.long_video.looking import Looks
from vllm_mm_ext.long_video.notes import Entry, lines_of
from vllm_mm_ext.long_video.selecting import selected
from vllm_mm_ext.long_video.task import Task

# Tokens that a chat template adds to a prompt at most, and that joining texts may add.
_TEMPLATE = 64
# Tokens of an entry at most, besides those of the note that it comes from: its times.
TIMES = 32
# A round is worth another one if it leaves at most this part of the tokens.
_WORTH = 0.75


async def reduced(looks: Looks, entries: Sequence[Entry], room: int) -> tuple[list[Entry], bool]:
    """The entries that matter to the question, as many as there is room for.

    Args:
        looks: Whom to ask, and what.
        entries: Entries of one video, in order of time.
        room: Tokens of the result at most; at least those of one note.

    Returns:
        The entries, in order of time, and whether some were left out though they may matter.
    """
    per_prompt = await prompt_room(looks.task, looks.model)
    kept, tokens = list(entries), await token_counts(looks.model, entries)
    while (before := sum(tokens)) > room:
        groups = _groups(kept, tokens, per_prompt)
        replies = await looks.ask_texts(_select_ask(looks, group, per_prompt) for group in groups)
        matter: list[Entry] = []
        for group, reply in zip(groups, replies, strict=True):
            matter += await _what_matters(looks.model, group, reply, room)
        if not matter:
            return _thinned(kept, tokens, room), True
        kept, tokens = matter, await token_counts(looks.model, matter)
        if sum(tokens) > max(room, _WORTH * before):
            return _thinned(kept, tokens, room), True
    return kept, False


async def prompt_room(task: Task, model: Model) -> int:
    """Tokens of notes in a prompt that sorts them out; its reply may have as many."""
    settings = task.settings
    bare = filled(settings.prompts.select, notes="", question=task.question)
    of_context = model.context_tokens - (await model.count_tokens([bare]))[0] - _TEMPLATE
    return min(max(settings.select_tokens, settings.note_tokens + TIMES), of_context // 2)


async def token_counts(model: Model, entries: Sequence[Entry]) -> list[int]:
    """Tokens of each entry in a prompt, with its times and what separates it from the next one."""
    return await model.count_tokens([f"{entry};\n" for entry in entries])


def _groups(entries: Sequence[Entry], tokens: Sequence[int], room: int) -> list[list[Entry]]:
    """Consecutive entries that have room in one prompt together."""
    groups: list[list[Entry]] = []
    filled_to = room
    for entry, count in zip(entries, tokens, strict=True):
        if filled_to + count > room:
            groups.append([])
            filled_to = 0
        groups[-1].append(entry)
        filled_to += count
    return groups


def _select_ask(looks: Looks, group: Sequence[Entry], room: int) -> Ask:
    prompt = looks.task.settings.prompts.select
    text = filled(prompt, notes=lines_of(group), question=looks.task.question)
    return Ask(None, None, (text,), max_tokens=room - TIMES)


async def _what_matters(
    model: Model, group: Sequence[Entry], reply: Reply | None, room: int
) -> Sequence[Entry]:
    # Nobody said that notes of a prompt that failed do not matter.
    if reply is None:
        return group
    chosen = selected(reply.text, group)
    # A summary without room would be left out in the end, and nothing would stand for its notes.
    has_room = max(await token_counts(model, chosen), default=0) <= room
    return chosen if has_room else group


def _thinned(entries: Sequence[Entry], tokens: Sequence[int], room: int) -> list[Entry]:
    """As many entries as there is room for, evenly chosen."""
    count = len(entries)
    while count:
        chosen = [int((i + 0.5) * len(entries) / count) for i in range(count)]
        if (needed := sum(tokens[i] for i in chosen)) <= room:
            return [entries[i] for i in chosen]
        count = min(count - 1, count * room // needed + 1)
    return []
