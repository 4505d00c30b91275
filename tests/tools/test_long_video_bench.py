"""``vllm-mm bench long-video`` without a server: arguments, films, logs, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import pytest
from typer.testing import CliRunner

from vllm_mm_ext.composer.training.questions import Question
from vllm_mm_ext.tools.bench import long_video_bench, long_video_text
from vllm_mm_ext.tools.bench.bench_cli import app
from vllm_mm_ext.tools.bench.commands import LongVideoPart
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.tools.bench.long_video_bench import PARTS
from vllm_mm_ext.tools.bench.long_video_client import (
    LongAnswer,
    Work,
    logged_work,
    requests_in_engine,
)
from vllm_mm_ext.tools.bench.long_video_files import TASKS, Films
from vllm_mm_ext.tools.bench.long_video_parts import (
    Study,
    accuracy,
    accuracy_rows,
    is_right,
    repeat_rows,
    second_rows,
)
from vllm_mm_ext.tools.bench.long_video_sides import sequential_decode_s

LOG = """\
(EngineCore) INFO 11-29 17:00:01 [loggers.py:199] Engine 000: Iteration(7): 2 context requests, \
640 context tokens, 1 generation requests, 1 generation tokens, iteration elapsed time: 21.30 ms, \
CPU KV cache usage: 0.4%, encoder inputs: 3, encoder output embeddings: 512
INFO 11-29 17:00:01 [loggers.py:199] something else: 99 context tokens
(EngineCore) INFO 11-29 17:00:02 [loggers.py:199] Engine 000: Iteration(8): 0 context requests, \
0 context tokens, 3 generation requests, 3 generation tokens, iteration elapsed time: 2.10 ms, \
CPU KV cache usage: 0.4%
(EngineCore) INFO 11-29 17:00:03 [loggers.py:199] Engine 000: Iteration(9): 1 context requests, \
100 context tokens, 0 generation requests, 0 generation tokens, iteration elapsed time: 9.00 ms, \
CPU KV cache usage: 0.4%, encoder inputs: 1, encoder output embeddings: 64
"""
METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="model"} 2.0
vllm:num_requests_waiting{engine="0",model_name="model"} 3.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="model",reason="capacity"} 3.0
"""


def answer(text: str, notes: list[str | None] | None = None, seconds: float = 1.0) -> LongAnswer:
    windows = [{} if note is None else {"note": note} for note in notes or []]
    return LongAnswer(text, seconds, {"windows": windows})


def by_name(rows: list[Row]) -> dict[str, tuple[float | None, float | None, float | None]]:
    return {row.name: (row.stock, row.plugin, row.ratio) for row in rows}


def test_work_is_summed_over_the_steps_that_vllm_logs() -> None:
    assert logged_work(LOG) == Work(tokens=640 + 1 + 3 + 100, encoder_inputs=4)
    assert logged_work("") == Work(0, 0)


def test_requests_in_the_engine_are_those_that_run_and_those_that_wait() -> None:
    assert requests_in_engine(METRICS) == 5


def test_the_command_line_offers_every_part() -> None:
    assert list(LongVideoPart) == list(PARTS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "241"], "--minutes"),
        (["--part", "speed"], "accuracy"),
        (["--questions", "0"], "--questions"),
    ],
)
def test_a_bad_argument_is_named(arguments: list[str], words: str) -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["long-video", *arguments])
    assert result.exit_code == 2
    assert words in result.output


def test_parts_run_in_their_order_and_their_rows_and_notes_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With parts that need no server in place of two that do."""
    asked: list[tuple[str, Any]] = []

    def part(name: str) -> Any:
        def measure(study: Study) -> list[Row]:
            asked.append((name, (list(study.minutes), study.questions)))
            study.notes.append(f"note of {name}")
            return [Row.of(name, "s", stock=[2.0], plugin=[1.0])]

        return measure

    apart = {"memory": part("memory"), "text": part("text")}
    monkeypatch.setattr(long_video_bench, "_APART", apart)
    context = BenchContext(1, tmp_path)
    result: BenchResult = long_video_bench.run(
        context, minutes=[30, 10, 30], parts=["text", "memory"], questions=3
    )
    assert asked == [("memory", ([10, 30], 3)), ("text", ([10, 30], 3))]
    assert [row.name for row in result.rows] == ["memory", "text"]
    assert result.notes[-2:] == ["note of memory", "note of text"]


def test_a_film_is_made_once_and_each_number_has_pictures_of_its_own(tmp_path: Path) -> None:
    films = Films(tmp_path)
    film = films.film(0, 1)
    made = film.path.stat().st_mtime_ns
    assert films.film(0, 1).path.stat().st_mtime_ns == made
    assert films.film(1, 1).path.read_bytes() != film.path.read_bytes()
    with av.open(str(film.path)) as container:
        assert len(container.streams.video) == len(container.streams.audio) == 1
        assert container.duration == pytest.approx(60e6, abs=1e5)
    assert sequential_decode_s(film.path) > 0


def test_questions_are_the_same_each_time_and_of_known_tasks(tmp_path: Path) -> None:
    films = Films(tmp_path)
    found = films.film(0, 1).questions(5)
    assert found == films.film(0, 1).questions(5)
    assert len(found) <= 5
    assert {question.task for question in found} <= set(TASKS)


def test_an_answer_is_right_when_it_says_exactly_what_is_true() -> None:
    question = Question("when", "When is the blue flash?", "0:28:52")
    assert is_right(question, " 0:28:52.\n")
    assert not is_right(question, "at 0:28:52")


def test_search_is_asked_apart_so_that_it_reads_no_notes_of_other_strategies(
    tmp_path: Path,
) -> None:
    salts: dict[str, set[str | None]] = {}

    class Noted:
        def ask(self, *_: Any, salt: str | None, options: Any) -> LongAnswer:
            salts.setdefault(options["long_video"]["strategy"], set()).add(salt)
            return answer("red")

    asker: Any = Noted()
    accuracy(Study(BenchContext(1, tmp_path), Films(tmp_path), [1], 2, True, asker))
    (of_search,) = salts.pop("search")
    assert of_search is not None
    assert len(salts) == 4
    assert not any(of_search in others for others in salts.values())


def test_accuracy_has_a_row_per_strategy_and_task_beside_the_single_pass() -> None:
    right = {
        "single": {"when": [False, True], "pitch": [False, False]},
        "auto": {"when": [True, True], "pitch": [True, False]},
    }
    rows = by_name(accuracy_rows(120, ["auto"], right))
    assert rows == {
        "120 min, auto: all questions": (25.0, 75.0, 3.0),
        "120 min, auto: when": (50.0, 100.0, 2.0),
        "120 min, auto: pitch": (0.0, 50.0, None),
    }


def test_a_second_question_is_shown_over_the_first() -> None:
    firsts = [(answer("a", seconds=10.0), Work(1000, 40))]
    laters = [(answer("b", seconds=1.0), Work(100, 0))]
    assert by_name(second_rows("10 min, search", firsts, laters)) == {
        "10 min, search, second question: time": (10.0, 1.0, 0.1),
        "10 min, search, second question: tokens computed": (1000, 100, 0.1),
        "10 min, search, second question: items encoded": (40, 0, 0.0),
    }


def test_repeated_answers_are_counted_as_equal_of_all() -> None:
    once = [answer("red", ["a", "b"]), answer("2", ["a", None])]
    again = [answer("red", ["a", "c"]), answer("3", ["a", None])]
    assert by_name(repeat_rows("10 min", once, again)) == {
        "10 min: equal answers": (2, 1, 0.5),
        "10 min: equal notes of windows": (4, 3, 0.75),
    }


def test_texts_after_the_end_of_the_videos_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ending:
        def __init__(self, _: object) -> None:
            pass

        def follow(self, *_: object) -> int:
            return 0

    monkeypatch.setattr(long_video_text, "Asker", Ending)
    server: Any = None
    with (
        pytest.raises(RuntimeError, match="the videos were over before the texts"),
        long_video_text._looked_through(server, [Path("a.mp4"), Path("b.mp4")]),
    ):
        pass
