"""An additional loss on embeddings of generated clips: they tell what is seen and heard when.

Answers say little about a clip each, and a text model that starts from nothing learns to ask its
media only once they tell things apart. Linear heads read the projectors' outputs and are thrown
away after training; the weight of this loss falls to zero on the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from vllm_mm_ext.composer.configuration import STATES_PER_SECOND, ComposerConfig
from vllm_mm_ext.composer.projector import text_width
from vllm_mm_ext.composer.training.batches import Batch, Media
from vllm_mm_ext.composer.training.clips import COLOURS, GLIDES, PITCHES, SHAPES, Clip
from vllm_mm_ext.composer.training.note_heads import NoteHeads
from vllm_mm_ext.composer.training.render import coverage, position
from vllm_mm_ext.composer.training.samples import Sample
from vllm_mm_ext.composer.training.things import SECONDS, UNKNOWN, ThingHeads, classified

_COLOURS = list(COLOURS)


class PerceptionHeads(nn.Module):  # type: ignore[misc]
    """What is present and where in a group of frames, and what sounds in a token of sound.

    Args:
        config: Of the model.
    """

    def __init__(self, config: ComposerConfig) -> None:
        super().__init__()
        text = text_width(config)
        self._stack = config.audio_stack
        self.present = nn.Linear(text, len(SHAPES) + 2 * len(_COLOURS))
        self.sound = nn.Linear(text, 2 + len(PITCHES) + len(GLIDES))
        self.place = nn.Linear(text, 2)
        # One clock for what is seen and what is heard.
        self.second = nn.Linear(text, SECONDS)
        self.flash_second = nn.Linear(text, SECONDS)
        self.cover = nn.Linear(int(config.vision_config.hidden_size), 1)
        self.things = ThingHeads(config)
        self.notes = NoteHeads(config)

    def forward(self, batch: Batch, media: Media, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """The loss for a batch of generated samples.

        Args:
            batch: Of samples that know their clips.
            media: What the model made of its media.
            states: What the text model made of them, as from `read_text`.
        """
        return self._media_loss(batch, media) + self.things(batch, states)

    def _media_loss(self, batch: Batch, media: Media) -> torch.Tensor:
        samples, video, audio = batch.samples, media.video, media.audio
        assert video is not None
        assert media.patches is not None
        covers = torch.tensor(_covers(samples, media.patches.shape[1]), device=video.device)
        cover = self.cover(media.patches)[..., 0]
        cover_loss = F.binary_cross_entropy_with_logits(cover, covers) * 3
        seen = [row for sample in samples for row in _group_labels(sample, batch.temporal)]
        target = torch.tensor(seen, dtype=torch.float32, device=video.device)
        groups = video.unflatten(0, (len(seen), -1)).mean(dim=1)
        loss = cover_loss + F.binary_cross_entropy_with_logits(self.present(groups), target) * 5
        places = [row for sample in samples for row in _group_places(sample, batch.temporal)]
        where = torch.tensor(places, dtype=torch.float32, device=video.device)
        # Frames of two scenes have no one place.
        known = where[:, 0] >= 0
        if bool(known.any()):
            loss = loss + F.mse_loss(self.place(groups[known]), where[known]) * 30
        times = [row for sample in samples for row in _group_times(sample, batch.temporal)]
        clock = torch.tensor(times, device=video.device)
        loss = loss + F.cross_entropy(self.second(groups), clock[:, 0])
        flashed = clock[:, 1] >= 0
        if bool(flashed.any()):
            told = self.flash_second(groups[flashed])
            loss = loss + F.cross_entropy(told, clock[flashed, 1])
        if audio is None:
            return loss
        heard = [row for sample in samples for row in _sound_labels(sample, self._stack)]
        labels = torch.tensor(heard, device=video.device)
        loss = loss + F.cross_entropy(self.second(audio), labels[:, 3])
        kinds = (2, len(PITCHES), len(GLIDES))
        loss = loss + classified(self.sound(audio), kinds, labels[:, : len(kinds)])
        return loss


def _covers(samples: Sequence[Sample], patches: int) -> npt.NDArray[np.float32]:
    """Share of each patch of each frame that the object takes, ``[frames, patches]``."""
    side = math.isqrt(patches)
    found = []
    for sample in samples:
        assert sample.clip is not None
        found += [coverage(sample.clip, second, side).ravel() for second in sample.seconds]
    return np.stack(found)


def _group_labels(sample: Sample, temporal: int) -> list[list[float]]:
    """Shapes, colours of objects and of flashes present in each group of frames."""
    assert sample.clip is not None
    found = []
    for start in range(0, len(sample.seconds), temporal):
        row = [0.0] * (len(SHAPES) + 2 * len(_COLOURS))
        for second in sample.seconds[start : start + temporal]:
            scene, flash = sample.clip.scene_at(second), sample.clip.flash_at(second)
            row[SHAPES.index(scene.shape)] = 1.0
            row[len(SHAPES) + _COLOURS.index(scene.colour)] = 1.0
            if flash is not None:
                row[len(SHAPES) + len(_COLOURS) + _COLOURS.index(flash.colour)] = 1.0
        found.append(row)
    return found


def _group_places(sample: Sample, temporal: int) -> list[tuple[float, float]]:
    """Mean place of the object in each group of frames; -1 where the group spans scenes."""
    assert sample.clip is not None
    found = []
    for start in range(0, len(sample.seconds), temporal):
        seconds = sample.seconds[start : start + temporal]
        scenes = {sample.clip.scene_at(second) for second in seconds}
        if len(scenes) > 1:
            found.append((-1.0, -1.0))
            continue
        x, y = np.mean([position(next(iter(scenes)), second) for second in seconds], axis=0)
        found.append((float(x), float(y)))
    return found


def _group_times(sample: Sample, temporal: int) -> list[tuple[int, int]]:
    """Whole second of each group of frames, and that of a flash in it; -1: none, or several."""
    assert sample.clip is not None
    found = []
    for start in range(0, len(sample.seconds), temporal):
        seconds = sample.seconds[start : start + temporal]
        flashes = {sample.clip.flash_at(second) for second in seconds} - {None}
        flashed = int(next(iter(flashes)).start) if len(flashes) == 1 else -1  # type: ignore[union-attr]
        middle = int(sum(seconds) / len(seconds))
        found.append((min(middle, SECONDS - 1), min(flashed, SECONDS - 1)))
    return found


def _sound_labels(sample: Sample, stack: int) -> list[tuple[int, int, int, int]]:
    assert sample.clip is not None
    if sample.sound is None:
        return []
    step = stack / STATES_PER_SECOND
    count = -(-len(sample.sound) // round(step * 16_000))
    return [
        (
            *sound_label(sample.clip, k * step, (k + 1) * step),
            min(int(k * step), SECONDS - 1),
        )
        for k in range(count)
    ]


def sound_label(clip: Clip, start: float, end: float) -> tuple[int, int, int]:
    """Tone or not, its pitch and its glide; unknown (-100) where a span holds part of both."""
    for tone in clip.tones or ():
        overlap = min(end, tone.end) - max(start, tone.start)
        if overlap > 0.6 * (end - start):
            return 1, PITCHES.index(tone.pitch), GLIDES.index(tone.glide)
        if overlap > 0:
            return UNKNOWN, UNKNOWN, UNKNOWN
    return 0, UNKNOWN, UNKNOWN
