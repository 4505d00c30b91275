"""How big a tiny checkpoint is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a tiny model. The defaults give well under a million parameters.

    Attributes:
        vocab_size: Tokens, special tokens included (at least 300: 256 bytes plus the specials).
        hidden_size: Width of the language model; a multiple of ``head_dim``.
        head_dim: Width of one attention head of the language model (64 or 128, so that every
            attention backend of vLLM takes it).
        layers: Language-model layers.
        kv_heads: Key/value heads.
        vision_layers: Layers of the vision tower.
        audio_layers: Layers of the audio tower.
        max_position: Context window in tokens.
        image_max_pixels: Pixel budget of one image (families that resize by budget).
        video_max_pixels: Pixel budget of a video, as the family's processor counts it: per frame
            for Qwen2-VL style, over all frames for Qwen3-VL style.
        image_size: Square input side in pixels of fixed-size towers (LLaVA-OneVision).
    """

    vocab_size: int = 512
    hidden_size: int = 128
    head_dim: int = 64
    layers: int = 2
    kv_heads: int = 1
    vision_layers: int = 2
    audio_layers: int = 2
    max_position: int = 32768
    image_max_pixels: int = 448 * 448
    video_max_pixels: int = 224 * 224
    image_size: int = 112

    @property
    def heads(self) -> int:
        """Attention heads of the language model."""
        return self.hidden_size // self.head_dim

    def mrope_section(self) -> list[int]:
        """Rotary channel pairs for time, height and width, in the families' own 1:1.5:1.5 split."""
        half = self.head_dim // 2
        side = half * 3 // 8
        return [half - 2 * side, side, side]
