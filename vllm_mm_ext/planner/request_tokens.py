"""What one request of a workload becomes in the engine: mm items, tokens, KV blocks.

The counts come from the processor that serves the model (``adapters/planning/``); this module only
holds and sums them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Modality = Literal["video", "audio", "image"]


@dataclass(frozen=True)
class ItemTokens:
    """One mm item of the engine: a segment of a video, its piece of sound, an image, a sound.

    Attributes:
        modality: vLLM's modality of the item. The sound of a video is ``audio``.
        encoder_inputs: Positions of the encoder's transformer: patches, or steps of sound.
        encoder_outputs: What the encoder makes of them, before any token reduction.
        embeddings: What the encoder cache keeps and the prompt holds, after reduction.
        audio_inputs, audio_outputs: The part of the two numbers above them that is the sound of an
            item with picture and sound together (composer); else 0.
    """

    modality: Modality
    encoder_inputs: int
    encoder_outputs: int
    embeddings: int
    audio_inputs: int = 0
    audio_outputs: int = 0


@dataclass(frozen=True)
class Stages:
    """Tokens of one medium after each stage.

    Attributes:
        sampled: Frames (images: 1; sound by itself: 0).
        encoded: Outputs of the encoder for the picture.
        pooled: What spatial pooling leaves of them.
        temporal: What temporal merging, and then merging or pruning of static tokens, leaves of
            those: the visual tokens of the prompt.
        sound: Audio tokens of the prompt.
        text: Tokens around and between those (markers, written times).
    """

    sampled: int = 0
    encoded: int = 0
    pooled: int = 0
    temporal: int = 0
    sound: int = 0
    text: int = 0

    @property
    def prompt(self) -> int:
        """Tokens that the medium adds to the prompt."""
        return self.temporal + self.sound + self.text


@dataclass(frozen=True)
class MediumTokens:
    """One video, sound or image of a request.

    Attributes:
        kind: What the client sends.
        seconds: Length of a video or a sound; 0 of an image.
        source: Width and height of the source in pixels; (0, 0) of a sound.
        size: Width and height of the frames that the encoder takes; (0, 0) of a sound.
        audio_seconds: Seconds of sound that the model hears.
        stages: Tokens after each stage.
        items: The medium's mm items in the order of the prompt.
        picture_inputs: Positions of the vision encoder that attend to each other where it has no
            windows: those of a temporal patch, or of an image; 0 of a sound.
        later_text: Tokens more at most if its frames are unevenly spaced, as later times have more
            digits; 0 for a model without written times.
    """

    kind: Modality
    seconds: float
    source: tuple[int, int]
    size: tuple[int, int]
    audio_seconds: float
    stages: Stages
    items: tuple[ItemTokens, ...]
    picture_inputs: int = 0
    later_text: int = 0


@dataclass(frozen=True)
class RequestTokens:
    """One request.

    Attributes:
        media: Its videos, sounds and images.
        text: Prompt tokens that are neither of a medium nor around one: the question and the chat
            template.
        output: Tokens of the answer.
    """

    text: int
    output: int
    media: tuple[MediumTokens, ...] = field(default=())

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.text + sum(medium.stages.prompt for medium in self.media)

    @property
    def most_prompt(self) -> int:
        """Tokens of the prompt at most, wherever in the videos the frames are."""
        return self.prompt + sum(medium.later_text for medium in self.media)

    @property
    def has_sound(self) -> bool:
        """Whether the model hears anything of the request."""
        return any(medium.audio_seconds for medium in self.media)

    @property
    def items(self) -> tuple[ItemTokens, ...]:
        """All mm items in the order of the prompt."""
        return tuple(item for medium in self.media for item in medium.items)

    @property
    def embeddings(self) -> int:
        """Outputs of encoders that stand in the prompt."""
        return sum(item.embeddings for item in self.items)

    @property
    def kv_tokens(self) -> int:
        """Tokens with keys and values when the answer ends: of its last token none are computed."""
        return self.prompt + max(0, self.output - 1)

    @property
    def most_kv_tokens(self) -> int:
        """The same at most, wherever in the videos the frames are."""
        return self.kv_tokens + self.most_prompt - self.prompt

    def by_modality(self) -> dict[Modality, int]:
        """Prompt tokens with embeddings, by vLLM's modality."""
        counts: Counter[Modality] = Counter()
        for item in self.items:
            counts[item.modality] += item.embeddings
        return dict(counts)

    def kv_blocks(self, block_size: int) -> int:
        """KV blocks that the request holds at its end, its frames being evenly spaced.

        Args:
            block_size: Tokens of a block.
        """
        return -(-self.kv_tokens // block_size)

    def most_kv_blocks(self, block_size: int) -> int:
        """The same at most, wherever in the videos the frames are."""
        return -(-self.most_kv_tokens // block_size)
