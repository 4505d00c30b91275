"""The composer in plain PyTorch: what trains, and what serving is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.siglip import SiglipVisionModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from vllm_mm_ext.composer.configuration import ComposerConfig
from vllm_mm_ext.composer.pooling import SpatialPooler, TemporalCompressor
from vllm_mm_ext.composer.projector import AudioProjector, VideoProjector


class ComposerForConditionalGeneration(PreTrainedModel):  # type: ignore[misc]
    """SigLIP and Whisper encoders, projectors and a text model.

    Args:
        config: Decides all of it.
    """

    config_class = ComposerConfig
    base_model_prefix = ""
    _tied_weights_keys = {
        "language_model.lm_head.weight": "language_model.model.embed_tokens.weight"
    }
    _supports_sdpa = True

    def __init__(self, config: ComposerConfig) -> None:
        super().__init__(config)
        vision: Any = config.vision_config
        # The pooling head has no part in a composer.
        vision.vision_use_head = False
        self.vision_tower = SiglipVisionModel(vision)
        self.video_projector = VideoProjector(config)
        if config.audio_config is not None:
            self.audio_tower = WhisperEncoder(config.audio_config)
            self.audio_projector = AudioProjector(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # The towers and the text model have their own; these are modules of the projectors.
        # transformers calls this for what a checkpoint lacks, such as the weights of a reduction
        # that was added to its config.json, and sees to it that what was loaded stays.
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, SpatialPooler | TemporalCompressor):
            nn.init.normal_(module.queries, std=module.queries.shape[1] ** -0.5)

    def get_input_embeddings(self) -> nn.Module:
        """The text model's token embeddings."""
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text model's token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The text model's output projection."""
        head: nn.Module = self.language_model.get_output_embeddings()
        return head

    def video_embeddings(
        self,
        pixel_values: torch.Tensor,
        seconds: torch.Tensor,
        frames_per_item: Sequence[int],
        pool: int = 1,
        temporal: int = 1,
    ) -> torch.Tensor:
        """Embeddings of all videos, as `VideoProjector.forward` returns them.

        Args:
            pixel_values: ``[frames, 3, size, size]``, normalised.
            seconds: float32 ``[frames]``, time of each in its video.
            frames_per_item: Frames of each video.
            pool, temporal: The reduction.
        """
        patches = self.vision_tower(pixel_values).last_hidden_state
        return self.video_projector(patches, seconds, frames_per_item, pool, temporal)

    def audio_embeddings(
        self,
        features: Sequence[torch.Tensor],
        start_seconds: Sequence[float],
        lengths: Sequence[int],
    ) -> list[torch.Tensor]:
        """Embeddings of windows of sound, each ``[tokens, text_hidden]``.

        Args:
            features: Log-mel ``[bins, frames]`` of each window.
            start_seconds: Time at which each window begins.
            lengths: True encoder frames of each window; outputs past them are dropped.
        """
        states = audio_states(self.audio_tower, features, lengths)
        out: list[torch.Tensor] = self.audio_projector(states, start_seconds)
        return out

    def inputs_embeds(
        self, input_ids: torch.Tensor, video: torch.Tensor | None, audio: torch.Tensor | None
    ) -> torch.Tensor:
        """Token embeddings ``[..., text_hidden]`` with those of the media at their placeholders.

        Args:
            input_ids: Ids of the prompt, placeholders included.
            video, audio: ``[placeholders, text_hidden]`` in prompt order; None where there are
                none.

        Raises:
            RuntimeError: There are more or fewer than placeholders.
        """
        embeds = self.get_input_embeddings()(input_ids)
        for media, token in (
            (video, self.config.video_pad_token_id),
            (audio, self.config.audio_pad_token_id),
        ):
            if media is not None:
                at = (input_ids == token).nonzero(as_tuple=True)
                embeds = embeds.index_put(at, media.to(embeds.dtype))
        return embeds

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The text model's output for ids or for `inputs_embeds`."""
        return self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def greedy(self, inputs_embeds: torch.Tensor, max_tokens: int, eos: int) -> list[int]:
        """Greedy answer to one prompt, without the end token.

        Args:
            inputs_embeds: ``[tokens, text_hidden]`` from `inputs_embeds`.
            max_tokens: Tokens at most.
            eos: Id that ends the answer.
        """
        answer: list[int] = []
        out = self.language_model(inputs_embeds=inputs_embeds[None], use_cache=True)
        while len(answer) < max_tokens:
            token = int(out.logits[0, -1].argmax())
            if token == eos:
                break
            answer.append(token)
            out = self.language_model(
                input_ids=torch.tensor([[token]], device=inputs_embeds.device),
                past_key_values=out.past_key_values,
                use_cache=True,
            )
        return answer


def audio_states(
    encoder: WhisperEncoder, features: Sequence[torch.Tensor], lengths: Sequence[int]
) -> list[torch.Tensor]:
    """Outputs of a Whisper encoder for windows of any length up to its own.

    transformers' own forward takes full windows only. Windows of equal length run as one batch.

    Args:
        encoder: Of transformers.
        features: Log-mel ``[bins, frames]`` of each window.
        lengths: True encoder frames of each window; outputs past them are dropped.

    Returns:
        ``[length, d_model]`` of each window.
    """
    parts: list[torch.Tensor] = [torch.empty(0)] * len(features)
    for frames in sorted({window.shape[-1] for window in features}):
        members = [i for i, window in enumerate(features) if window.shape[-1] == frames]
        batch = torch.stack([features[i] for i in members]).to(encoder.conv1.weight.dtype)
        x = nn.functional.gelu(encoder.conv1(batch))
        x = nn.functional.gelu(encoder.conv2(x)).transpose(1, 2)
        x = x + encoder.embed_positions.weight[: x.shape[1]]
        for layer in encoder.layers:
            x = layer(x, None)
        for i, states in zip(members, encoder.layer_norm(x), strict=True):
            parts[i] = states[: lengths[i]]
    return parts
