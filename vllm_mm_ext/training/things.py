"""An additional loss on questions about generated clips: a name knows what it names.

Whoever asks whether a circle comes before a cross must have found both. Few such questions come by,
and until all steps towards an answer are learnt, the answer itself is guessed and teaches little.
So linear heads read, where a question names something, all that is known of it. They are thrown
away after training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from vllm_mm_ext.models.composer.configuration import ComposerConfig
from vllm_mm_ext.models.composer.connector import text_width
from vllm_mm_ext.training.batches import Batch
from vllm_mm_ext.training.clips import (
    COLOURS,
    GLIDES,
    MOTIONS,
    PITCHES,
    SHAPES,
    Flash,
    Scene,
    ToneEvent,
)
from vllm_mm_ext.training.questions import Thing, path_seen
from vllm_mm_ext.training.render import position
from vllm_mm_ext.training.samples import Sample

_COLOURS = list(COLOURS)
_UNKNOWN = -100
# Whole seconds told apart.
_SECONDS = 64
# Classes of each head: when it begins, its shape (or that on screen), its colour (or that on
# screen), its motion, pitch and glide.
_CLASSES = (_SECONDS, len(SHAPES), len(COLOURS), len(MOTIONS), len(PITCHES), len(GLIDES))
# Where an object is when first and last seen.
_PLACES = 4
_PLACE_WEIGHT = 10.0


class ThingHeads(nn.Module):  # type: ignore[misc]
    """What a named thing is like and when it is, read from states of the text model.

    Args:
        config: Of the model. States half-way and before the last layer are read.
    """

    def __init__(self, config: ComposerConfig) -> None:
        super().__init__()
        text = config.text_config
        layers = int(getattr(text, "get_text_config", lambda: text)().num_hidden_layers)
        self._layers = sorted({max(1, layers // 2), max(1, layers - 1)})
        self.heads = nn.ModuleList(
            nn.Linear(text_width(config), sum(_CLASSES) + _PLACES) for _ in self._layers
        )

    def forward(self, batch: Batch, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """The loss for a batch of generated samples.

        Args:
            batch: Of samples that know their clips.
            states: As from `text_states`.
        """
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
            parts = head(states[layer][rows, places]).split((*_CLASSES, _PLACES), -1)
            for index, logits in enumerate(parts[:-1]):
                has = labels[:, index] != _UNKNOWN
                if bool(has.any()):
                    loss = loss + F.cross_entropy(logits[has], labels[has, index])
            has = paths[:, 0] >= 0
            if bool(has.any()):
                loss = loss + F.mse_loss(parts[-1][has], paths[has]) * _PLACE_WEIGHT
        return loss / len(self._layers)


def thing_labels(thing: Thing, sample: Sample) -> tuple[list[int], list[float]]:
    """What the frames and the sound of a sample tell of a thing of its clip.

    Returns:
        The class for each of `_CLASSES`, -100 where there is none or the frames do not decide it;
        and where the object is when first and when last seen (x, y, x, y as shares of the
        picture), all -1 for anything else.
    """
    assert sample.clip is not None
    begin, shape, colour, motion, pitch, glide = (_UNKNOWN,) * 6
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
            shape, colour = SHAPES.index(scene.shape), _COLOURS.index(scene.colour)
    return [min(begin, _SECONDS - 1), shape, colour, motion, pitch, glide], path
