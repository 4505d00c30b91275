"""An additional loss inside the text model: what it knows on its way to an answer.

Whoever asks whether a circle comes before a cross must have found both; whoever counts flashes must
have told one from the next. Few such questions come by, and until all steps towards an answer are
learnt, the answer itself is guessed and teaches little. So linear heads read, where a question
names something, all that is known of it, and along the video and its sound, what has begun so far.
They are thrown away after training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from vllm_mm_ext.composer.configuration import (
    SAMPLE_RATE,
    STATES_PER_SECOND,
    ComposerConfig,
)
from vllm_mm_ext.composer.projector import text_width
from vllm_mm_ext.composer.training.batches import Batch
from vllm_mm_ext.composer.training.clips import (
    COLOURS,
    GLIDES,
    MOTIONS,
    PITCHES,
    SHAPES,
    Flash,
    Scene,
    ToneEvent,
)
from vllm_mm_ext.composer.training.questions import Thing, known_at, path_seen
from vllm_mm_ext.composer.training.render import position
from vllm_mm_ext.composer.training.samples import Sample

_COLOURS = list(COLOURS)
UNKNOWN = -100
"""Label of what is not known."""
SECONDS = 64
"""Whole seconds told apart."""
# Classes of each head: when it begins, its shape (or that on screen), its colour (or that on
# screen), its motion, pitch and glide.
_CLASSES = (SECONDS, len(SHAPES), len(COLOURS), len(MOTIONS), len(PITCHES), len(GLIDES))
# Where an object is when first and last seen.
_PLACES = 4
_PLACE_WEIGHT = 10.0
# Flashes, or tones, of a clip at most.
_MOST = 4
# Classes of what is known after a frame: which scene this is, how many flashes and tones have
# begun, and the motion so far.
_SEEN_SO_FAR = (len(SHAPES), _MOST + 1, _MOST + 1, len(MOTIONS))


def layers_read(config: ComposerConfig) -> list[int]:
    """Layers of the text model after which heads read its states: half-way and before the last.

    Args:
        config: Of the model.
    """
    text = config.text_config
    layers = int(getattr(text, "get_text_config", lambda: text)().num_hidden_layers)
    return sorted({max(1, layers // 2), max(1, layers - 1)})


class ThingHeads(nn.Module):  # type: ignore[misc]
    """What a named thing is like, and what has begun so far, read from states of the text model.

    Args:
        config: Of the model.
    """

    def __init__(self, config: ComposerConfig) -> None:
        super().__init__()
        self._layers = layers_read(config)
        self._video_pad = int(config.video_pad_token_id)
        self._audio_pad = int(config.audio_pad_token_id)
        self._token_s = config.audio_stack / STATES_PER_SECOND
        width = text_width(config)
        self.heads = nn.ModuleList(nn.Linear(width, sum(_CLASSES) + _PLACES) for _ in self._layers)
        self.seen = nn.Linear(width, sum(_SEEN_SO_FAR))
        self.heard = nn.Linear(width, _MOST + 1)

    def forward(self, batch: Batch, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """The loss for a batch of generated samples.

        Args:
            batch: Of samples that know their clips.
            states: As from `read_text`.
        """
        return self._things_loss(batch, states) + self._so_far_loss(batch, states)

    def _so_far_loss(self, batch: Batch, states: Sequence[torch.Tensor]) -> torch.Tensor:
        halfway = states[self._layers[0]]
        seen = torch.tensor(
            [row for sample in batch.samples for row in seen_so_far(sample, batch.temporal)],
            device=halfway.device,
        )
        groups = halfway[batch.input_ids == self._video_pad].unflatten(0, (len(seen), -1))
        loss = classified(self.seen(groups.mean(dim=1)), _SEEN_SO_FAR, seen)
        heard = [count for sample in batch.samples for count in heard_so_far(sample, self._token_s)]
        if heard:
            labels = torch.tensor(heard, device=halfway.device)
            logits = self.heard(halfway[batch.input_ids == self._audio_pad])
            loss = loss + F.cross_entropy(logits, labels)
        return loss

    def _things_loss(self, batch: Batch, states: Sequence[torch.Tensor]) -> torch.Tensor:
        device = states[0].device
        loss = torch.zeros((), device=device)
        if not batch.mentions:
            return loss
        rows = torch.tensor([one.row for one in batch.mentions], device=device)
        places = torch.tensor([one.position for one in batch.mentions], device=device)
        known = [thing_labels(one.thing, batch.samples[one.row]) for one in batch.mentions]
        labels = torch.tensor([classes for classes, _ in known], device=device)
        paths = torch.tensor([path for _, path in known], dtype=torch.float32, device=device)
        for layer, head in zip(self._layers, self.heads, strict=True):
            out = head(states[layer][rows, places])
            loss = loss + classified(out[:, :-_PLACES], _CLASSES, labels)
            has = paths[:, 0] >= 0
            if bool(has.any()):
                loss = loss + F.mse_loss(out[has, -_PLACES:], paths[has]) * _PLACE_WEIGHT
        return loss / len(self._layers)


def classified(logits: torch.Tensor, classes: Sequence[int], labels: torch.Tensor) -> torch.Tensor:
    """Sum over several classifications of the loss where the label is known.

    Args:
        logits: ``[n, sum(classes)]``.
        classes: Of each classification.
        labels: ``[n, len(classes)]``; `UNKNOWN` where not known.
    """
    loss = logits.new_zeros(())
    for index, part in enumerate(logits.split(tuple(classes), -1)):
        known = labels[:, index] != UNKNOWN
        if bool(known.any()):
            loss = loss + F.cross_entropy(part[known], labels[known, index])
    return loss


def seen_so_far(sample: Sample, temporal: int) -> list[tuple[int, ...]]:
    """The classes for each of `_SEEN_SO_FAR` after each group of frames of a sample."""
    clip = sample.clip
    assert clip is not None
    times = np.array(sample.seconds)
    found: list[tuple[int, ...]] = []
    scenes, flashes = set(), set()
    for start in range(0, len(times), temporal):
        until = times[: start + temporal]
        now = float(until[-1])
        for second in sample.seconds[start : start + temporal]:
            scenes.add(clip.scene_at(second))
            flashes.add(clip.flash_at(second))
        tones = UNKNOWN
        if clip.tones is not None:
            tones = sum(tone.start < now for tone in clip.tones)
        scene = clip.scene_at(now)
        motion = MOTIONS.index(scene.motion) if path_seen(scene, until) else UNKNOWN
        found.append((len(scenes) - 1, len(flashes - {None}), tones, motion))
    return found


def heard_so_far(sample: Sample, token_s: float) -> list[int]:
    """Tones that have begun by the end of each token of the sound of a sample."""
    if sample.sound is None:
        return []
    assert sample.clip is not None
    tones = sample.clip.tones or ()
    count = math.ceil(len(sample.sound) / SAMPLE_RATE / token_s - 1e-6)
    # Half a token in: what has only just begun cannot be heard yet.
    ends = [(index + 0.5) * token_s for index in range(count)]
    return [sum(tone.start < end for tone in tones) for end in ends]


def thing_labels(thing: Thing, sample: Sample) -> tuple[list[int], list[float]]:
    """What the frames and the sound of a sample tell of a thing of its clip.

    Returns:
        The class for each of `_CLASSES`, -100 where there is none or the frames do not decide it;
        and where the object is when first and when last seen (x, y, x, y as shares of the
        picture), all -1 for anything else.
    """
    assert sample.clip is not None
    begin, shape, colour, motion, pitch, glide = (UNKNOWN,) * 6
    path = [-1.0] * _PLACES
    match thing:
        case Scene():
            shape, colour = SHAPES.index(thing.shape), _COLOURS.index(thing.colour)
            times = np.array(sample.seconds)
            inside = times[(times >= thing.start) & (times < thing.end)]
            if len(inside):
                begin = int(inside[0])
                path = [*position(thing, inside[0]), *position(thing, inside[-1])]
            if path_seen(thing, times):
                motion = MOTIONS.index(thing.motion)
        case Flash():
            begin, colour = int(thing.start), _COLOURS.index(thing.colour)
        case ToneEvent():
            begin = int(thing.start)
            pitch, glide = PITCHES.index(thing.pitch), GLIDES.index(thing.glide)
            scene = sample.clip.scene_at(thing.start)
            if known_at(scene, thing.start, np.array(sample.seconds)):
                shape, colour = SHAPES.index(scene.shape), _COLOURS.index(scene.colour)
    return [min(begin, SECONDS - 1), shape, colour, motion, pitch, glide], path
