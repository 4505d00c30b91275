"""Held-out accuracy by task and reduction, on clips and recordings that training never sees."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich.table import Table

from vllm_mm_ext.composer.reference import ComposerForConditionalGeneration
from vllm_mm_ext.composer.training.batches import (
    encode_media,
    make_batch,
    read_text,
    right_answers,
)
from vllm_mm_ext.composer.training.note_language import Entry, read_entries
from vllm_mm_ext.composer.training.note_samples import notes_sample, window_sample
from vllm_mm_ext.composer.training.questions import TASKS
from vllm_mm_ext.composer.training.samples import HELD_OUT, Sample, generated_sample

Accuracy = dict[str, dict[str, float]]
"""Reduction to task to share of right answers; the task ``mean`` is the mean over tasks."""

# Seconds and frames of the clips, in turn.
_SHAPES = ((6, 12), (10, 20), (16, 32), (20, 40), (24, 48), (30, 60))

_NOTE_TOKENS = 128


def held_out_samples(clips: int, size: int, *, sound: bool = True) -> list[Sample]:
    """Held-out clips of all lengths, with 16 questions each; one in ten has no sound track.

    Args:
        clips: How many.
        size: Width and height of the frames.
        sound: The others have one.
    """
    return [
        generated_sample(
            HELD_OUT + index,
            *_SHAPES[index % len(_SHAPES)],
            16,
            size,
            sound=sound and index % 10 != 9,
            augment=False,
        )
        for index in range(clips)
    ]


def held_out_windows(
    count: int, size: int, frames: Sequence[int], *, sound: bool = True
) -> list[Sample]:
    """Windows of held-out recordings, with so many frames in turn."""
    return [
        window_sample(
            HELD_OUT + index, frames[index % len(frames)], 9, size, sound=sound, augment=False
        )
        for index in range(count)
    ]


def held_out_notes(count: int, size: int, windows: Sequence[int]) -> list[Sample]:
    """Right notes about held-out recordings, of so many windows in turn."""
    return [
        notes_sample(HELD_OUT + index, windows[index % len(windows)], 16, size)
        for index in range(count)
    ]


@torch.no_grad()  # type: ignore[untyped-decorator]
def accuracy(
    model: ComposerForConditionalGeneration,
    tokenizer: Any,
    samples: Sequence[Sample],
    pairs: Sequence[tuple[int, int]] = (),
) -> Accuracy:
    """Share of questions answered right, every token of the answer, with each reduction.

    Args:
        model: On any device.
        tokenizer: Its tokenizer.
        samples: What is asked about.
        pairs: Reductions as (pool, temporal); none given: all that the model declares.
    """
    device = next(model.parameters()).device
    found: Accuracy = {}
    for pool, temporal in pairs or [(1, 1), *(one[:2] for one in model.config.declared)]:
        right: dict[str, list[bool]] = defaultdict(list)
        for start in range(0, len(samples), 6):
            part = samples[start : start + 6]
            batch = make_batch(model.config, tokenizer, part, pool, temporal).to(device)
            with _without_dropout(model):
                read = read_text(model, batch, encode_media(model, batch))
            for task, one in right_answers(batch, read.logits):
                right[task].append(one)
        shares = {task: sum(all_) / len(all_) for task, all_ in right.items()}
        shares["mean"] = sum(shares.values()) / max(1, len(shares))
        found[f"pool {pool}, temporal {temporal}"] = shares
    return found


@torch.no_grad()  # type: ignore[untyped-decorator]
def note_scores(
    model: ComposerForConditionalGeneration,
    tokenizer: Any,
    samples: Sequence[Sample],
    pool: int = 1,
    temporal: int = 1,
) -> dict[str, tuple[float, float]]:
    """Precision and recall of what the model writes as notes about windows, by kind of entry.

    An entry is right if its text is, and its second is at most one off.

    Args:
        model: On any device.
        tokenizer: Its tokenizer.
        samples: As from `held_out_windows`; those that ask for no note are passed over.
        pool, temporal: The reduction.
    """
    device = next(model.parameters()).device
    pairs: list[tuple[list[Entry], list[Entry]]] = []
    for sample in samples:
        turns = [turn for turn in sample.turns if turn.task == "note"][:1]
        if not turns:
            continue
        alone = replace(sample, turns=turns)
        batch = make_batch(model.config, tokenizer, [alone], pool, temporal).to(device)
        with _without_dropout(model):
            media = encode_media(model, batch)
            embeds = model.inputs_embeds(batch.input_ids, media.video, media.audio)
            prompt = embeds[0, : batch.spans[0].start + 1]
            tokens = model.greedy(prompt, _NOTE_TOKENS, tokenizer.eos_token_id)
        pairs.append((read_entries(tokenizer.decode(tokens)), read_entries(turns[0].answer)))
    return {
        kind: (
            _share_found([(told, right) for told, right in pairs], kind),
            _share_found([(right, told) for told, right in pairs], kind),
        )
        for kind in ("scene", "flash", "tone")
    }


@contextmanager
def _without_dropout(model: ComposerForConditionalGeneration) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _share_found(pairs: Sequence[tuple[list[Entry], list[Entry]]], kind: str) -> float:
    """Share of the entries of a kind in the first of each pair that the second has as well."""
    found = [
        any(one.text == other.text and abs(one.second - other.second) <= 1 for other in others)
        for entries, others in pairs
        for one in entries
        if one.kind == kind
    ]
    return sum(found) / max(1, len(found))


def accuracy_table(found: Accuracy) -> Table:
    """The accuracies as a table for a terminal, tasks down, reductions across."""
    table = Table("task", *found)
    tasks = {task for shares in found.values() for task in shares}
    for task in [*(t for t in TASKS if t in tasks), *sorted(tasks - set(TASKS))]:
        table.add_row(task, *(f"{shares.get(task, 0):.1%}" for shares in found.values()))
    return table
