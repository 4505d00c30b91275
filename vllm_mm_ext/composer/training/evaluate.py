"""Held-out accuracy by task and reduction, on clips that training never sees."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from vllm_mm_ext.composer.reference import ComposerForConditionalGeneration
from vllm_mm_ext.composer.training.batches import (
    answer_logits,
    encode_media,
    make_batch,
    right_answers,
    text_states,
)
from vllm_mm_ext.composer.training.questions import TASKS
from vllm_mm_ext.composer.training.samples import HELD_OUT, Sample, generated_sample

Accuracy = dict[str, dict[str, float]]
"""Reduction to task to share of right answers; the task ``mean`` is the mean over tasks."""

# Seconds and frames of the clips, in turn.
_SHAPES = ((6, 12), (10, 20), (16, 32), (20, 40), (24, 48), (30, 60))


def held_out_samples(clips: int, size: int) -> list[Sample]:
    """Held-out clips of all lengths, with 16 questions each; one in ten has no sound track."""
    return [
        generated_sample(
            HELD_OUT + index,
            *_SHAPES[index % len(_SHAPES)],
            16,
            size,
            sound=index % 10 != 9,
            augment=False,
        )
        for index in range(clips)
    ]


@torch.no_grad()  # type: ignore[untyped-decorator]
def accuracy(
    model: ComposerForConditionalGeneration, tokenizer: Any, samples: Sequence[Sample]
) -> Accuracy:
    """Share of questions answered right, every token of the answer, with each reduction.

    Args:
        model: On any device.
        tokenizer: Its tokenizer.
        samples: What is asked about.
    """
    device = next(model.parameters()).device
    found: Accuracy = {}
    model.eval()
    for pool, temporal in [(1, 1), *(one[:2] for one in model.config.declared)]:
        right: dict[str, list[bool]] = defaultdict(list)
        for start in range(0, len(samples), 6):
            part = samples[start : start + 6]
            batch = make_batch(model.config, tokenizer, part, pool, temporal).to(device)
            states = text_states(model, batch, encode_media(model, batch))
            logits, _ = answer_logits(model, batch, states[-1])
            for task, one in right_answers(batch, logits):
                right[task].append(one)
        shares = {task: sum(all_) / len(all_) for task, all_ in right.items()}
        shares["mean"] = sum(shares.values()) / max(1, len(shares))
        found[f"pool {pool}, temporal {temporal}"] = shares
    model.train()
    return found


def accuracy_table(found: Accuracy) -> Table:
    """The accuracies as a table for a terminal, tasks down, reductions across."""
    table = Table("task", *found)
    tasks = {task for shares in found.values() for task in shares}
    for task in [*(t for t in TASKS if t in tasks), *sorted(tasks - set(TASKS))]:
        table.add_row(task, *(f"{shares.get(task, 0):.1%}" for shares in found.values()))
    return table
