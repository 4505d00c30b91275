"""What ``bench long-video`` measures with the composer: answers, tokens, time, what caches hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

from vllm_mm_ext.composer.training.questions import Question, normalised
from vllm_mm_ext.tools.bench.harness import BenchContext, Row
from vllm_mm_ext.tools.bench.long_video_client import Asker, LongAnswer, Work
from vllm_mm_ext.tools.bench.long_video_files import TASKS, Film, Films

# As many frames as a server allows: it lowers what was asked until it fits the context.
_SINGLE = {"max_frames": 768, "fps": 4.0, "long_video": {"strategy": "single"}}
_WINDOWS_BEFORE_LEAVING = 5


@dataclass
class Study:
    """What the parts run with.

    Attributes:
        context: Progress and directories.
        films: Makes the videos.
        minutes: Lengths of the videos, ascending.
        questions: Asked about each video of the part ``accuracy``, at most.
        rolling: Ask with the strategy ``rolling`` too.
        asker: Asks the one server of the composer; None for parts that start their own.
        notes: Sentences for the reader, added to by the parts.
    """

    context: BenchContext
    films: Films
    minutes: Sequence[int]
    questions: int
    rolling: bool
    asker: Asker | None = None
    notes: list[str] = field(default_factory=list)

    def ask(
        self, film: Film, question: str, strategy: str, *, salt: str | None = None
    ) -> LongAnswer:
        """Ask the composer about a film with a strategy."""
        assert self.asker is not None
        options = _SINGLE if strategy == "single" else {"long_video": {"strategy": strategy}}
        return self.asker.ask(film.path, question, salt=salt, options=options)

    def measured(self, film: Film, question: str, strategy: str) -> tuple[LongAnswer, Work]:
        """The same, and what the engine computed for it."""
        assert self.asker is not None
        mark = self.asker.mark()
        answer = self.ask(film, question, strategy)
        return answer, self.asker.work_since(mark)


Part = Callable[[Study], list[Row]]


def accuracy(study: Study) -> list[Row]:
    """Right answers per task: a single pass beside the strategies, the same questions each."""
    strategies = ["auto", "map_reduce", "search", *(["rolling"] if study.rolling else [])]
    rows = []
    for minutes in study.minutes:
        right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        used: dict[str, int] = defaultdict(int)
        for repeat in range(study.context.repeats):
            film = study.films.film(repeat, minutes)
            for question in film.questions(study.questions):
                for strategy in ("single", *strategies):
                    # Apart, else one takes what the others noted.
                    answer = study.ask(film, question.text, strategy, salt=strategy)
                    right[strategy][question.task].append(is_right(question, answer.text))
                    if strategy == "auto":
                        used[answer.report.get("strategy", "single")] += 1
        rows += accuracy_rows(minutes, strategies, right)
        chosen = ", ".join(f"{name} {count}" for name, count in sorted(used.items()))
        study.notes.append(f"{minutes} min: auto used {chosen}")
    return rows


def is_right(question: Question, answer: str) -> bool:
    """An answer is right when it says exactly what is true."""
    return normalised(answer) == normalised(question.answer)


def accuracy_rows(
    minutes: int,
    strategies: Sequence[str],
    right: Mapping[str, Mapping[str, Sequence[bool]]],
) -> list[Row]:
    """Per cent of right answers: the single pass in the column of stock, a strategy beside it.

    Args:
        minutes: Length of the videos.
        strategies: Those to show.
        right: Outcomes by strategy, ``single`` among them, and task.
    """
    asked = [task for task in TASKS if right["single"].get(task)]
    rows = []
    for strategy in strategies:
        for name, tasks in (("all questions", asked), *((task, [task]) for task in asked)):
            single, plugin = (
                100 * mean(outcome for task in tasks for outcome in right[side][task])
                for side in ("single", strategy)
            )
            rows.append(
                Row.of(f"{minutes} min, {strategy}: {name}", "%", stock=[single], plugin=[plugin])
            )
    return rows


def tokens(study: Study) -> list[Row]:
    """Tokens computed for a question by search, and by notes about all windows.

    Each has videos of its own, as servers keep what they computed.
    """
    rows = []
    for minutes in study.minutes:
        found: dict[str, list[float]] = defaultdict(list)
        seconds: dict[str, list[float]] = defaultdict(list)
        for repeat in range(study.context.repeats):
            for offset, strategy in ((100, "map_reduce"), (200, "search")):
                film = study.films.film(offset + repeat, minutes)
                answer, work = study.measured(film, _when(film).text, strategy)
                found[strategy].append(float(work.tokens))
                seconds[strategy].append(answer.seconds)
        for what, unit, values in (("computed", "tokens", found), ("time", "s", seconds)):
            rows.append(
                Row.of(
                    f"{minutes} min, {what}: search against all windows",
                    unit,
                    stock=values["map_reduce"],
                    plugin=values["search"],
                )
            )
    return rows


def second(study: Study) -> list[Row]:
    """A second question about a video, against the first one."""
    rows = []
    for minutes in study.minutes:
        for offset, strategy in ((300, "map_reduce"), (400, "search")):
            asked: list[list[tuple[LongAnswer, Work]]] = [[], []]
            for repeat in range(study.context.repeats):
                film = study.films.film(offset + repeat, minutes)
                for question, outcomes in zip(_two(film), asked, strict=True):
                    outcomes.append(study.measured(film, question.text, strategy))
            rows += second_rows(f"{minutes} min, {strategy}", *asked)
    return rows


def second_rows(
    name: str,
    firsts: Sequence[tuple[LongAnswer, Work]],
    seconds: Sequence[tuple[LongAnswer, Work]],
) -> list[Row]:
    """Rows with the first question in the column of stock and the second beside it."""

    def row(what: str, unit: str, value: Callable[[LongAnswer, Work], float]) -> Row:
        first, later = ([value(*one) for one in ones] for ones in (firsts, seconds))
        return Row.of(f"{name}, second question: {what}", unit, stock=first, plugin=later)

    return [
        row("time", "s", lambda answer, _: answer.seconds),
        row("tokens computed", "tokens", lambda _, work: float(work.tokens)),
        row("items encoded", "count", lambda _, work: float(work.encoder_inputs)),
    ]


def repeated(study: Study) -> list[Row]:
    """The same questions twice with the same seed, sharing nothing but the server."""
    rows = []
    for minutes in study.minutes:
        for strategy in ("map_reduce", "search"):
            film = study.films.film(500, minutes)
            asked = film.questions(study.questions)
            rounds = [
                [study.ask(film, question.text, strategy, salt=salt) for question in asked]
                for salt in (f"{strategy} once", f"{strategy} again")
            ]
            rows += repeat_rows(f"{minutes} min, {strategy}", *rounds)
    return rows


def repeat_rows(name: str, once: Sequence[LongAnswer], again: Sequence[LongAnswer]) -> list[Row]:
    """Rows with what could be equal in the column of stock, and what is equal beside it."""
    answers = [first.text == later.text for first, later in zip(once, again, strict=True)]
    notes = [
        one == other
        for first, later in zip(once, again, strict=True)
        for one, other in zip(first.notes, later.notes, strict=True)
    ]
    return [
        Row.of(f"{name}: equal {what}", "count", stock=[len(equal)], plugin=[sum(equal)])
        for what, equal in (("answers", answers), ("notes of windows", notes))
    ]


def disconnect(study: Study) -> list[Row]:
    """A client that leaves in the middle: until the engine is idle, and what is kept."""
    assert study.asker is not None
    rows = []
    for minutes in study.minutes:
        idle, told, kept = [], [], []
        for repeat in range(study.context.repeats):
            film = study.films.film(600 + repeat, minutes)
            question = _when(film).text
            options = {"long_video": {"strategy": "map_reduce"}}
            windows = study.asker.follow(
                film.path, question, options, lambda done: done >= _WINDOWS_BEFORE_LEAVING
            )
            idle.append(study.asker.idle_after())
            answer = study.ask(film, question, "map_reduce")
            told.append(float(windows))
            kept.append(float(sum(bool(window.get("kept")) for window in answer.windows)))
        rows += [
            Row.of(f"{minutes} min, client gone: engine idle after", "s", plugin=idle),
            Row.of(
                f"{minutes} min, client gone: windows noted before, kept for the next request",
                "count",
                stock=told,
                plugin=kept,
            ),
        ]
    return rows


def _when(film: Film) -> Question:
    """A question that is about one moment, if there is one."""
    asked = film.questions(1 << 10)
    return next((one for one in asked if one.task == "when"), asked[0])


def _two(film: Film) -> tuple[Question, Question]:
    """Two questions, about different moments where there are such."""
    asked = film.questions(1 << 10)
    when = [one for one in asked if one.task == "when"]
    first, later, *_ = [*when, *(one for one in asked if one not in when)]
    return first, later
