"""An additional loss on notes: what the model knows at the end of each entry it reads.

The time of an entry stands before what happens, so whoever is asked when something happens must
have carried the time along; and whoever counts must have told one from the next. Linear heads read
both where an entry ends. They are thrown away after training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vllm_mm_ext.composer.configuration import ComposerConfig
from vllm_mm_ext.composer.projector import text_width
from vllm_mm_ext.composer.training.batches import Batch
from vllm_mm_ext.composer.training.things import classified, layers_read

# Hour, minute and second of an entry, and how many flashes and tones there were up to it.
_CLASSES = (4, 60, 60, 10, 10)


class NoteHeads(nn.Module):  # type: ignore[misc]
    """When each entry is and how many of its kind there were, from states of the text model.

    Args:
        config: Of the model.
    """

    def __init__(self, config: ComposerConfig) -> None:
        super().__init__()
        self._layers = layers_read(config)
        self.heads = nn.ModuleList(
            nn.Linear(text_width(config), sum(_CLASSES)) for _ in self._layers
        )

    def forward(self, batch: Batch, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """The loss for a batch with notes.

        Args:
            batch: Its ``marks`` must not be empty.
            states: As from `read_text`.
        """
        device = states[0].device
        rows = torch.tensor([mark.row for mark in batch.marks], device=device)
        places = torch.tensor([mark.position for mark in batch.marks], device=device)
        labels = torch.tensor([mark.labels for mark in batch.marks], device=device)
        top = torch.tensor(_CLASSES, device=device) - 1
        loss = torch.zeros((), device=device)
        for layer, head in zip(self._layers, self.heads, strict=True):
            out = head(states[layer][rows, places])
            loss = loss + classified(out, _CLASSES, torch.minimum(labels, top))
        return loss / len(self._layers)
