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
        visible: bool ``[rows, 1, length, length]``: which token (last axis) each token sees; None
            where it is those before it, as without independent questions.
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
    visible: torch.Tensor | None
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
        samples: Of any lengths; rows are padded at the end with tokens that nothing sees. Sound is
            left out if the model hears nothing.
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
    visible = None
    if any(sample.independent for sample in samples):
        same = owners[:, :, None] == owners[:, None, :]
        seen = (same | (owners[:, None, :] == 0)) & torch.ones(length, length).tril().bool()
        visible = seen[:, None]
    sounds = [_windows(config, sample) for sample in samples]
    return Batch(
        input_ids=ids,
        position_ids=positions,
        visible=visible,
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
        audio_samples=0 if sample.sound is None or not config.hears else len(sample.sound),
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
    if sample.sound is None or not len(sample.sound) or not config.hears:
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


class Reading(NamedTuple):
    """What the text model makes of a batch.

    Attributes:
        states: ``[rows, length, text]`` each: what enters the first layer, and what leaves each of
            them.
        logits: ``[answer tokens, vocabulary]`` where answers are predicted, row by row.
        labels: int64 ``[answer tokens]``, what is right there.
    """

    states: tuple[torch.Tensor, ...]
    logits: torch.Tensor
    labels: torch.Tensor


def read_text(model: ComposerForConditionalGeneration, batch: Batch, media: Media) -> Reading:
    """Run the text model over a batch.

    It runs as a whole, as some scale or cap their logits, and many have masks of their own.

    Args:
        model: What predicts. For a batch with ``visible``, one that `check_shares_clips` accepts.
        batch: What is asked.
        media: What the model made of its media.
    """
    asked = batch.labels != IGNORED
    # Logits of all tokens of the prompts would take gigabytes.
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, given: (given[0][asked],)
    )
    try:
        out = model.language_model(
            inputs_embeds=model.inputs_embeds(batch.input_ids, media.video, media.audio),
            attention_mask=batch.visible,
            position_ids=None if batch.visible is None else batch.position_ids,
            output_hidden_states=True,
            use_cache=False,
        )
    finally:
        hook.remove()
    return Reading(out.hidden_states, out.logits, batch.labels[asked])


def check_shares_clips(model: ComposerForConditionalGeneration) -> None:
    """Refuse a text model that cannot be asked independent questions about one clip.

    Their tokens do not see each other, which only full attention by SDPA takes in all layers.

    Raises:
        ValueError: The text model has other layers. The message names them.
    """
    text = model.language_model
    config = text.config.get_text_config()
    layers = getattr(config, "layer_types", None)
    kinds = set(layers or ()) - {"full_attention"}
    if layers is None:
        bounds = ("sliding_window", "attention_chunk_size")
        kinds |= {name for name in bounds if getattr(config, name, None) is not None}
    if text._is_stateful and not kinds:
        kinds.add("a recurrent state")
    if text.config._attn_implementation != "sdpa":
        kinds.add(f"{text.config._attn_implementation} attention")
    if kinds:
        raise ValueError(
            f"the text model ({config.model_type}) has {', '.join(sorted(kinds))}; the generator "
            "asks several questions about one clip, which takes full attention by SDPA in all "
            "layers. Train on a folder of clips"
        )


def right_answers(batch: Batch, logits: torch.Tensor) -> list[tuple[str, bool]]:
    """Task of each question, and whether every token of its answer comes out.

    The same as greedy decoding: as long as all tokens before were right, they are the context.
    """
    guess = torch.full_like(batch.labels, IGNORED)
    guess[batch.labels != IGNORED] = logits.argmax(-1)
    right = (guess == batch.labels).cpu()
    return [(span.task, bool(right[span.row, span.start : span.end].all())) for span in batch.spans]
