"""Parts of ``bench live`` with the composer: are answers right, live and after an hour."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np

from vllm_mm_ext.composer.training.clips import draw_clip
from vllm_mm_ext.composer.training.questions import Question, questions
from vllm_mm_ext.composer.training.render import encode_clip
from vllm_mm_ext.composer.training.samples import HELD_OUT, balanced
from vllm_mm_ext.testing.server import Server
from vllm_mm_ext.tools.bench.chat import ask
from vllm_mm_ext.tools.bench.harness import Row
from vllm_mm_ext.tools.bench.live_feed import Feed, feed_of, play
from vllm_mm_ext.tools.bench.live_sides import COMPOSER_FPS, Study, file_messages, live_composer
from vllm_mm_ext.tools.bench.live_timing import forget_last, options
from vllm_mm_ext.tools.bench.long_video_parts import is_right
from vllm_mm_ext.tools.cli.live_client import LiveSession, live_session

# Neither those that training shows, nor those of other benchmarks.
_FIRST_SEED = HELD_OUT + 3_000_000
# Up to the 64 frames that a file may have.
_DURATIONS = (8, 12, 16)
_CLIPS, _QUESTIONS = 12, 8
_ANSWER = 16
_SPEED = 20.0
_HOUR_S = 3600.0
# In the hour, clips are shown in turns: when one comes again, the context has long lost it. One in
# so many is asked about, so that each turn asks about others.
_HOUR_CLIPS, _ASKED = 48, 7
# Room for one clip, which is what the composer was trained on: among several it does not know which
# one it is asked about.
_CAP = 1300


@dataclass(frozen=True)
class Shown:
    """A clip that training never saw, as it is sent live and as a file, and what is asked of it."""

    path: Path
    feed: Feed
    questions: tuple[Question, ...]


def shown_clips(first: int, count: int, directory: Path) -> Iterator[Shown]:
    """So many held-out clips with sound, from the ``first`` on; files are kept for later runs."""
    directory.mkdir(parents=True, exist_ok=True)
    durations = itertools.cycle(_DURATIONS)
    seeds = (seed for seed in itertools.count(_FIRST_SEED + first))
    shown = 0
    while shown < count:
        seed = next(seeds)
        clip = draw_clip(seed, next(durations))
        if not clip.has_sound:
            continue
        rng = np.random.default_rng(seed)
        found = balanced(questions(clip, rng), _QUESTIONS, rng, weights={})
        path = directory / f"clip-{seed}.mp4"
        if not path.exists():
            encode_clip(clip, made := path.with_name(f"new-{path.name}"))
            made.rename(path)
        yield Shown(path, feed_of(path, COMPOSER_FPS), tuple(found))
        shown += 1


def answers(study: Study) -> list[Row]:
    """Right answers about clips shown live, beside those about the same clips sent as files."""
    live: dict[str, list[bool]] = defaultdict(list)
    sent: dict[str, list[bool]] = defaultdict(list)
    same: list[bool] = []
    for shown in shown_clips(0, _CLIPS * study.context.repeats, _directory(study)):
        told = asyncio.run(_told_live(study.composer, shown))
        for question, text in zip(shown.questions, told, strict=True):
            messages = file_messages(shown.path, question.text)
            answer = ask(study.composer, messages, max_tokens=_ANSWER, ignore_end=False).text
            live[question.task].append(is_right(question, text))
            sent[question.task].append(is_right(question, answer))
            same.append(text.strip() == answer.strip())
    study.notes.append(
        f"answers: {_CLIPS * study.context.repeats} held-out clips of {_DURATIONS[0]} to "
        f"{_DURATIONS[-1]} s, {len(same)} questions; live: {COMPOSER_FPS:g} JPEG pictures a second "
        f"and sound, {_SPEED:g} times real time; stock column: the same file in a chat completion, "
        f"frames as composer-tiny/serve.yaml says; {100 * mean(same):.0f} % of answers are equal"
    )
    return [
        Row.of(
            "composer, right answers: clip as a file, live",
            "%",
            stock=[_share(sent)],
            plugin=[_share(live)],
        ),
        *(
            Row.of(
                f"the same: {task}", "%", stock=[100 * mean(sent[task])], plugin=[100 * mean(found)]
            )
            for task, found in sorted(live.items())
        ),
    ]


def _directory(study: Study) -> Path:
    return study.context.work_dir / "clips"


def _share(right: Mapping[str, Sequence[bool]]) -> float:
    return 100 * mean(one for outcomes in right.values() for one in outcomes)


async def _told_live(server: Server, shown: Shown) -> list[str]:
    """Answers to all questions, each asked right after the clip."""
    async with live_session(server.url, None) as session:
        await session.update(**options(answer=_ANSWER))
        return await _show_and_ask(session, shown, shown.questions, 0.0)


async def _show_and_ask(
    session: LiveSession, shown: Shown, asked: Sequence[Question], offset: float
) -> list[str]:
    await play(session, shown.feed, speed=_SPEED, offset=offset)
    await session.commit()
    texts = []
    for question in asked:
        await session.say(question.text)
        texts.append((await session.respond()).text)
        # The answer, then the question: all are asked of the same conversation.
        await forget_last(session)
        await forget_last(session)
    return texts


def hour(study: Study) -> list[Row]:
    """An hour in one session, faster than it is: alive, and right about what was shown last."""
    clips = list(shown_clips(10_000, _HOUR_CLIPS, _directory(study)))
    with live_composer(study.context, {"max_tokens": _CAP}) as server:
        told = asyncio.run(_hour(server, clips))
        fresh = [asyncio.run(_fresh(server, *asked[:3])) for asked in told.asked]
    later = [right for *_, right in told.asked]
    tokens = told.clips * mean(prompt for _, prompt in fresh)
    study.notes.append(
        f"hour: {len(clips)} held-out clips of {_DURATIONS[0]} to {_DURATIONS[-1]} s one after "
        f"another, {told.clips} in all, about {tokens:,.0f} tokens, {_SPEED:g} times real time; a "
        f"question about one in {_ASKED}, right after it; mm_ext.live.max_tokens {_CAP} of the "
        "context's 16,384; stock column: the same clip and question in a session of its own"
    )
    return [
        Row.of("hour in one session: shown", "s", plugin=[told.seconds]),
        Row.of("the same: the longest prompt", "tokens", plugin=[float(told.longest)]),
        Row.of("the same: items dropped", "count", plugin=[float(told.dropped)]),
        Row.of("the same: errors", "count", plugin=[float(told.errors)]),
        Row.of(
            "the same, right about the last clip: in a fresh session, in the hour",
            "%",
            stock=[100 * mean(right for right, _ in fresh)],
            plugin=[100 * mean(later)],
        ),
    ]


@dataclass
class Told:
    """What came of an hour.

    Attributes:
        asked: Clips that were asked about, with the question and whether the answer was right.
        clips: Clips shown.
        seconds: Their length together.
        longest: Most tokens of a prompt.
        dropped: Items that the server took out of the conversation.
        errors: Error events.
    """

    asked: list[tuple[Path, Feed, Question, bool]]
    clips: int = 0
    seconds: float = 0.0
    longest: int = 0
    dropped: int = 0
    errors: int = 0


async def _fresh(server: Server, path: Path, feed: Feed, question: Question) -> tuple[bool, int]:
    """Whether the answer is right in a session of its own, and the tokens of its prompt."""
    async with live_session(server.url, None) as session:
        await session.update(**options(answer=_ANSWER))
        (text,) = await _show_and_ask(session, Shown(path, feed, (question,)), (question,), 0.0)
        return is_right(question, text), session.answers[-1].prompt_tokens


async def _hour(server: Server, clips: Sequence[Shown]) -> Told:
    told = Told([])
    async with live_session(server.url, None) as session:
        await session.update(**options(answer=_ANSWER))
        while told.seconds < _HOUR_S:
            turn, index = divmod(told.clips, len(clips))
            shown = clips[index]
            asked: tuple[Question, ...] = ()
            if told.clips % _ASKED == _ASKED - 1:
                asked = (shown.questions[turn % len(shown.questions)],)
            known = len(session.answers)
            texts = await _show_and_ask(session, shown, asked, told.seconds)
            told.clips += 1
            told.seconds += shown.feed.seconds
            for question, text in zip(asked, texts, strict=True):
                told.asked.append((shown.path, shown.feed, question, is_right(question, text)))
            for answer in session.answers[known:]:
                told.longest = max(told.longest, answer.prompt_tokens)
        told.errors = len(session.errors)
        # Every clip is one item, and stays one unless it is dropped.
        told.dropped = told.clips - len(session.items)
    return told
