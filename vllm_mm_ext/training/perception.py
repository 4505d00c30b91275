"""An additional loss on embeddings of generated clips: they tell what is seen and heard when.

Answers say little about a clip each, and a text model that starts from nothing learns to ask its
media only once they tell things apart. Linear heads read the connectors' outputs and are thrown
away after training; the weight of this loss falls to zero on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from vllm_mm_ext.models.composer.configuration import STATES_PER_SECOND
from vllm_mm_ext.training.batches import Batch
from vllm_mm_ext.training.clips import COLOURS, GLIDES, PITCHES, SHAPES, Clip
from vllm_mm_ext.training.samples import Sample

_COLOURS = list(COLOURS)
UNKNOWN = -100


class PerceptionHeads(nn.Module):  # type: ignore[misc]
    """What is present in a group of frames, and what sounds in a token of sound.

    Args:
        text: Channels of the embeddings.
    """

    def __init__(self, text: int) -> None:
        super().__init__()
        self.present = nn.Linear(text, len(SHAPES) + 2 * len(_COLOURS))
        self.sound = nn.Linear(text, 2 + len(PITCHES) + len(GLIDES))

    def forward(
        self,
        batch: Batch,
        samples: Sequence[Sample],
        video: torch.Tensor,
        audio: torch.Tensor | None,
        stack: int,
    ) -> torch.Tensor:
        """The loss for a batch of generated samples.

        Args:
            batch: Of the samples.
            samples: With their clips.
            video: Embeddings of all groups, ``[groups * tokens, text]``.
            audio: Embeddings of all tokens of sound; None without.
            stack: Encoder frames per token of sound.
        """
        seen = [row for sample in samples for row in _group_labels(sample, batch.temporal)]
        target = torch.tensor(seen, dtype=torch.float32, device=video.device)
        groups = video.unflatten(0, (len(seen), -1)).mean(dim=1)
        loss = F.binary_cross_entropy_with_logits(self.present(groups), target) * 5
        if audio is None:
            return loss
        heard = [row for sample in samples for row in _sound_labels(sample, stack)]
        labels = torch.tensor(heard, device=video.device)
        parts = self.sound(audio).split((2, len(PITCHES), len(GLIDES)), -1)
        for index, logits in enumerate(parts):
            known = labels[:, index] != UNKNOWN
            if bool(known.any()):
                loss = loss + F.cross_entropy(logits[known], labels[known, index])
        return loss


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


def _sound_labels(sample: Sample, stack: int) -> list[tuple[int, int, int]]:
    assert sample.clip is not None
    if sample.sound is None:
        return []
    step = stack / STATES_PER_SECOND
    count = -(-len(sample.sound) // round(step * 16_000))
    return [sound_label(sample.clip, k * step, (k + 1) * step) for k in range(count)]


def sound_label(clip: Clip, start: float, end: float) -> tuple[int, int, int]:
    """Tone or not, its pitch and its glide; unknown (-100) where a span holds part of both."""
    for tone in clip.tones or ():
        overlap = min(end, tone.end) - max(start, tone.start)
        if overlap > 0.6 * (end - start):
            return 1, PITCHES.index(tone.pitch), GLIDES.index(tone.glide)
        if overlap > 0:
            return UNKNOWN, UNKNOWN, UNKNOWN
    return 0, UNKNOWN, UNKNOWN
