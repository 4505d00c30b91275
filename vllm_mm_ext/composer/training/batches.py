"""Samples to tensors: prompts, which token sees which, and what is to be predicted where."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_mm_ext.composer.configuration import ComposerConfig
from vllm_mm_ext.composer.features import mel_windows, pixel_values
from vllm_mm_ext.composer.layout import video_layout
from vllm_mm_ext.composer.reference import ComposerForConditionalGeneration
from vllm_mm_ext.composer.training.note_language import entry_ends
from vllm_mm_ext.composer.training.questions import Question, Thing
from vllm_mm_ext.composer.training.samples import Sample
from vllm_mm_ext.composer.training.tokenizer import ChatPieces, chat_pieces

IGNORED = -100


class Span(NamedTuple):
    """Where the answer to a question of some task is predicted: ``labels[row, start:end]``."""

    task: str
    row: int
    start: int
    end: int


class Mention(NamedTuple):
    """The token at ``[row, position]`` names a thing of the row's clip, or asks about it alone."""

    row: int
    position: int
    thing: Thing


class Mark(NamedTuple):
    """An entry of notes ends with the token at ``[row, position]``.

    ``labels`` are its hour, minute and second, and how many flashes and tones there were up to it.
    """

    row: int
    position: int
    labels: tuple[int, int, int, int, int]


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples as tensors. ``rows`` is their number, ``length`` that of the longest prompt.

    Attributes:
        input_ids: int64 ``[rows, length]``.
        position_ids: int64 ``[rows, length]``. Independent questions share positions.
        visible: bool ``[rows, 1, length, length]``: which token (last axis) each token sees.
        labels: int64 ``[rows, length]``: the token to predict there; only in answers.
        spans: Where the answers are.
        mentions: Where questions name things of generated clips.
        marks: Where entries of notes end.
        pixel_values, seconds, frames_per_item: As `video_embeddings` takes them.
        features, start_seconds, lengths: As `audio_embeddings` takes them; empty when silent.
        pool, temporal: The reduction.
        samples: What the batch was made of.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    visible: torch.Tensor
    labels: torch.Tensor
    spans: list[Span]
    mentions: list[Mention]
    marks: list[Mark]
    pixel_values: torch.Tensor
    seconds: torch.Tensor
    frames_per_item: list[int]
    features: list[torch.Tensor]
    start_seconds: list[float]
    lengths: list[int]
    pool: int
    temporal: int
    samples: list[Sample]

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        moved = {
            key: value.to(device, non_blocking=True)
            for key, value in self.__dict__.items()
            if isinstance(value, torch.Tensor)
        }
        features = [window.to(device, non_blocking=True) for window in self.features]
        return Batch(**(self.__dict__ | moved | {"features": features}))


def make_batch(
    config: ComposerConfig, tokenizer: Any, samples: Sequence[Sample], pool: int, temporal: int
) -> Batch:
    """Prompts as the chat template and the processor lay them out.

    Args:
        config: Of the model.
        tokenizer: As from `build_tokenizer`.
        samples: Of any lengths; rows are padded at the end with tokens that nothing sees.
        pool, temporal: The reduction of all of them.
    """
    pieces = chat_pieces(tokenizer)
    rows = [_row(config, tokenizer, pieces, sample, pool, temporal) for sample in samples]
    length = max(len(row.ids) for row in rows)
    shape = (len(rows), length)
    ids = torch.full(shape, int(tokenizer.pad_token_id))
    positions = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    # Question that a token belongs to: 0 for what all see, -1 for padding.
    owners = torch.full(shape, -1)
    spans, mentions, marks = [], [], []
    for index, row in enumerate(rows):
        size = len(row.ids)
        ids[index, :size] = torch.tensor(row.ids)
        positions[index, :size] = torch.tensor(row.positions)
        owners[index, :size] = torch.tensor(row.owners)
        for task, start, end in row.spans:
            labels[index, start:end] = ids[index, start + 1 : end + 1]
            spans.append(Span(task, index, start, end))
        marks += [Mark(index, position, labels) for position, labels in row.marks]
        mentions += [Mention(index, position, thing) for position, thing in row.mentions]
    same = owners[:, :, None] == owners[:, None, :]
    visible = (same | (owners[:, None, :] == 0)) & torch.ones(length, length).tril().bool()
    sounds = [_windows(config, sample) for sample in samples]
    return Batch(
        input_ids=ids,
        position_ids=positions,
        visible=visible[:, None],
        labels=labels,
        spans=spans,
        mentions=mentions,
        marks=marks,
        pixel_values=pixel_values(np.concatenate([sample.frames for sample in samples])),
        seconds=torch.tensor([s for sample in samples for s in sample.seconds]),
        frames_per_item=[len(sample.seconds) for sample in samples if sample.seconds],
        features=[window for features, _, _ in sounds for window in features],
        start_seconds=[start for _, starts, _ in sounds for start in starts],
        lengths=[length for _, _, lengths in sounds for length in lengths],
        pool=pool,
        temporal=temporal,
        samples=list(samples),
    )


class _Row(NamedTuple):
    ids: list[int]
    positions: list[int]
    owners: list[int]
    spans: list[tuple[str, int, int]]
    mentions: list[tuple[int, Thing]]
    marks: list[tuple[int, tuple[int, int, int, int, int]]]


def _row(
    config: ComposerConfig,
    tokenizer: Any,
    pieces: ChatPieces,
    sample: Sample,
    pool: int,
    temporal: int,
) -> _Row:
    def text(given: str) -> list[int]:
        ids: list[int] = tokenizer.encode(given, add_special_tokens=False)
        return ids

    layout = video_layout(
        config,
        sample.seconds,
        pool=pool,
        temporal=temporal,
        audio_samples=0 if sample.sound is None else len(sample.sound),
        timestamp_tokens=lambda second: text(f"{second:.1f}s"),
    )
    ids = [*pieces.opening, *(layout if sample.seconds else text(sample.text))]
    shared = len(ids)
    positions, owners = list(range(shared)), [0] * shared
    spans, mentions = [], []
    for number, turn in enumerate(sample.turns, 1):
        before = [] if sample.independent or number == 1 else pieces.closing[1:]
        asked = [*before, *text(turn.text), *pieces.asking]
        told = [*text(turn.answer), pieces.closing[0]]
        # The last token of the question predicts the first of the answer.
        first = len(ids) + len(asked) - 1
        spans.append((turn.task, first, first + len(told)))
        for place, thing in _mentioned(tokenizer, turn):
            mentions.append((len(ids) + len(before) + place, thing))
        if len(turn.references) == 1:
            mentions.append((first, turn.references[0].thing))
        start = shared if sample.independent else len(ids)
        positions += range(start, start + len(asked) + len(told))
        owners += [number if sample.independent else 0] * (len(asked) + len(told))
        ids += asked + told
    marks = [
        (len(pieces.opening) + place, labels) for place, labels in _marked(tokenizer, sample.text)
    ]
    return _Row(ids, positions, owners, spans, mentions, marks)


def _marked(tokenizer: Any, notes: str) -> Iterator[tuple[int, tuple[int, int, int, int, int]]]:
    """Last token of each entry of notes, and the labels of its `Mark`."""
    ends = _token_ends(tokenizer, notes)
    counted: Counter[str] = Counter()
    for entry, end in entry_ends(notes):
        counted[entry.kind] += 1
        hour, rest = divmod(entry.second, 3600)
        labels = (hour, *divmod(rest, 60), counted["flash"], counted["tone"])
        yield bisect_left(ends, end), labels


def _mentioned(tokenizer: Any, turn: Question) -> Iterator[tuple[int, Thing]]:
    """Last token of each name in a question, and what it names."""
    if not turn.references:
        return
    ends = _token_ends(tokenizer, turn.text)
    for reference in turn.references:
        yield bisect_left(ends, reference.end), reference.thing


def _token_ends(tokenizer: Any, text: str) -> list[int]:
    """Where in a text each of its tokens ends."""
    told = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [end for _, end in told.offset_mapping]


def _windows(
    config: ComposerConfig, sample: Sample
) -> tuple[list[torch.Tensor], list[float], list[int]]:
    if sample.sound is None or not len(sample.sound):
        return [], [], []
    features = mel_windows(config, sample.sound)
    starts = [config.audio_window_s * index for index in range(len(features))]
    return features, starts, config.audio_states(len(sample.sound))


class Media(NamedTuple):
    """What the model makes of the media of a batch, row by row.

    Attributes:
        video: ``[tokens, text]`` embeddings of all videos; None without.
        audio: ``[tokens, text]`` embeddings of all sound; None without.
        patches: ``[frames, patches, vision]`` outputs of the vision tower; None without frames.
    """

    video: torch.Tensor | None
    audio: torch.Tensor | None
    patches: torch.Tensor | None


def encode_media(model: ComposerForConditionalGeneration, batch: Batch) -> Media:
    """Encode the videos and the sound of a batch."""
    if not batch.frames_per_item:
        return Media(None, None, None)
    patches = model.vision_tower(batch.pixel_values).last_hidden_state
    video = model.video_projector(
        patches, batch.seconds, batch.frames_per_item, batch.pool, batch.temporal
    )
    audio = None
    if batch.features:
        audio = torch.cat(
            model.audio_embeddings(batch.features, batch.start_seconds, batch.lengths)
        )
    return Media(video, audio, patches)


def text_states(
    model: ComposerForConditionalGeneration, batch: Batch, media: Media
) -> tuple[torch.Tensor, ...]:
    """Hidden states ``[rows, length, text]`` of the text model: what enters the first layer, and
    what leaves each of them (the last one's normalised).
    """
    embeds = model.inputs_embeds(batch.input_ids, media.video, media.audio)
    states: tuple[torch.Tensor, ...] = model.language_model.get_decoder()(
        inputs_embeds=embeds,
        attention_mask=batch.visible,
        position_ids=batch.position_ids,
        output_hidden_states=True,
    ).hidden_states
    return states


def answer_logits(
    model: ComposerForConditionalGeneration, batch: Batch, states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits where answers are predicted, and what is right there.

    Args:
        model: What predicts.
        batch: What is asked.
        states: The last of `text_states`.

    Returns:
        ``[answer tokens, vocabulary]`` and int64 ``[answer tokens]``, row by row.
    """
    asked = batch.labels != IGNORED
    return model.get_output_embeddings()(states[asked]), batch.labels[asked]


def right_answers(batch: Batch, logits: torch.Tensor) -> list[tuple[str, bool]]:
    """Task of each question, and whether every token of its answer comes out.

    The same as greedy decoding: as long as all tokens before were right, they are the context.
    """
    guess = torch.full_like(batch.labels, IGNORED)
    guess[batch.labels != IGNORED] = logits.argmax(-1)
    right = (guess == batch.labels).cpu()
    return [(span.task, bool(right[span.row, span.start : span.end].all())) for span in batch.spans]
