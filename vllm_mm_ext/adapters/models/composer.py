"""The composer in vLLM: its own SigLIP, Whisper encoder and text model, joined by the projectors.

Weights have the names that `reference.py` gives them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models.interfaces import (
    MultiModalEmbeddings,
    SupportsLoRA,
    SupportsMultiModal,
    SupportsPP,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.siglip import SiglipVisionModel
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors
from vllm.utils.multi_stream_utils import maybe_execute_in_parallel
from vllm.utils.torch_utils import aux_stream

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.encoder_cache.outputs import fit_to_keep
from vllm_mm_ext.adapters.models.composer_audio_encoder import WindowEncoder
from vllm_mm_ext.adapters.models.encoder_batches import encode_frames_in_batches
from vllm_mm_ext.adapters.processors.composer import MICROSECONDS, ComposerMultiModalProcessor
from vllm_mm_ext.adapters.processors.composer_info import (
    ComposerDummyInputsBuilder,
    ComposerProcessingInfo,
)
from vllm_mm_ext.adapters.processors.fields import (
    AUDIO,
    KEPT,
    KINDS,
    POSITIONS,
    REDUCTION,
    TEXT,
    reduction_of,
)
from vllm_mm_ext.composer.configuration import ARCHITECTURE, ComposerConfig
from vllm_mm_ext.composer.projector import AudioProjector, VideoProjector
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.video.reduce import reduce_tokens

Windows = list[tuple[torch.Tensor, int, float]]
"""Log-mel ``[bins, frames]``, true encoder frames and first second of some windows of sound."""


@MULTIMODAL_REGISTRY.register_processor(
    ComposerMultiModalProcessor,
    info=ComposerProcessingInfo,
    dummy_inputs=ComposerDummyInputsBuilder,
)
class MMExtComposerForConditionalGeneration(
    nn.Module,  # type: ignore[misc]
    SupportsMultiModal,  # type: ignore[misc]
    SupportsLoRA,  # type: ignore[misc]
    SupportsPP,  # type: ignore[misc]
):
    """Any text model of vLLM with eyes and ears."""

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            f"vision_tower.{part}": f"vision_tower.vision_model.{part}"
            for part in ("embeddings.", "encoder.", "post_layernorm.")
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:  # noqa: ARG003
        """What stands for an item in a prompt without a chat template."""
        if modality.startswith("video"):
            return "<|video_pad|>"
        if modality.startswith("audio"):
            return "<|audio_pad|>"
        raise MediaError(f"a composer takes video and audio, not {modality}")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: ComposerConfig = vllm_config.model_config.hf_config
        self.config = config
        self.multimodal_config = vllm_config.model_config.multimodal_config
        settings = vllm_compat.settings_of(vllm_config.model_config)
        self.encoder_max_patches = settings.compression.encoder_max_patches
        self.configure_mm_token_handling(
            config.text_config.vocab_size, [config.video_pad_token_id, config.audio_pad_token_id]
        )
        # Towers and projectors are not quantised: they are small, and their weights come in the
        # checkpoint's own type.
        with self._mark_tower_model(vllm_config, "video"):
            self.vision_tower = SiglipVisionModel(
                config.vision_config, prefix=maybe_prefix(prefix, "vision_tower")
            )
            self.video_projector = VideoProjector(config)
        if config.audio_config is not None:
            of_audio = vllm_config.with_hf_config(config.audio_config, [ARCHITECTURE])
            of_audio.quant_config = None
            with self._mark_tower_model(vllm_config, {"video", "audio"}):
                self.audio_tower = WindowEncoder(
                    vllm_config=of_audio,
                    prefix=maybe_prefix(prefix, "audio_tower"),
                    enable_pp=False,
                )
                self.audio_projector = AudioProjector(config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which parts of the model are what."""
        return MultiModelKeys.from_string_field(
            language_model="language_model.",
            connector=["video_projector.", "audio_projector."],
            tower_model=["vision_tower.", "audio_tower."],
        )

    # --- media ------------------------------------------------------------------------------------

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """Embeddings of some segments, or of some windows of sound, in the order of their prompts.

        Args:
            kwargs: Fields of the items, as `adapters/processors/composer.py` makes them.

        Returns:
            ``[embeddings, text_hidden]`` of each item, each in memory of its own.
        """
        made: list[torch.Tensor] = []
        if "pixel_values_videos" in kwargs:
            made += self._segments(kwargs)
        if "audio_mel" in kwargs:
            windows = self._windows(kwargs, "audio")
            encoded = self._encode_windows([one for own in windows for one in own])
            made += _joined(encoded, [len(own) for own in windows])
        return fit_to_keep(made)

    def _segments(self, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        frames = list(kwargs["pixel_values_videos"])
        windows = self._windows(kwargs, "video")
        heard = [one for own in windows for one in own]
        seen, sounds = self._side_by_side(
            frames, [positions / MICROSECONDS for positions in kwargs[POSITIONS]], kwargs, heard
        )
        audio = _joined(sounds, [len(own) for own in windows])
        return [
            _interleaved(kinds.cpu(), video, sound)
            for kinds, video, sound in zip(kwargs[KINDS], seen, audio, strict=True)
        ]

    def _side_by_side(
        self,
        frames: Sequence[torch.Tensor],
        seconds: Sequence[torch.Tensor],
        kwargs: Mapping[str, Any],
        heard: Windows,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Frames and windows of sound; on one CUDA device, each kind on a stream of its own."""

        def see() -> list[torch.Tensor]:
            reductions = [reduction_of(values) for values in kwargs[REDUCTION]]
            return self._encode_frames(frames, seconds, reductions, kwargs[KEPT])

        if not heard:
            return see(), []
        # Ranks of a tensor-parallel group share one buffer for their sums, so the towers must not
        # sum at the same time.
        alone = get_tensor_model_parallel_world_size() == 1
        stream = aux_stream() if frames[0].is_cuda and alone else None
        if stream is not None and self._events is None:
            self._events = (torch.cuda.Event(), torch.cuda.Event())
        found: tuple[list[torch.Tensor], list[torch.Tensor]] = maybe_execute_in_parallel(
            see, lambda: self._encode_windows(heard), *(self._events or (None, None)), stream
        )
        return found

    def _encode_frames(
        self,
        frames: Sequence[torch.Tensor],
        seconds: Sequence[torch.Tensor],
        reductions: Sequence[Reduction],
        kept: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Tokens of each segment: patches of all frames first, then a reduction at a time."""
        counts = [len(own) for own in frames]
        made = [self._no_tokens()] * len(frames)
        if not sum(counts):
            return made
        bound = self.encoder_max_patches
        patches = encode_frames_in_batches(
            self.vision_tower,
            torch.cat(list(frames)),
            max(1, bound // self.config.side**2) if bound else 0,
        ).split(counts)
        pairs = [(reduction.pool, reduction.temporal) for reduction in reductions]
        for pool, temporal in dict.fromkeys(pairs):
            own = [
                index
                for index, pair in enumerate(pairs)
                if pair == (pool, temporal) and counts[index]
            ]
            if not own:
                continue
            at = torch.cat([seconds[index] for index in own]).float()
            tokens = self.video_projector(
                torch.cat([patches[index] for index in own]),
                at.to(patches[0].device, non_blocking=True),
                [counts[index] for index in own],
                pool,
                temporal,
            )
            per_group = self.config.frame_tokens(pool)
            sizes = [-(-counts[index] // temporal) * per_group for index in own]
            for index, part in zip(own, tokens.split(sizes), strict=True):
                made[index] = part
        side = self.config.side
        return [
            tokens
            if reduction.static == "none" or not len(tokens)
            else reduce_tokens(tokens, (count, side, side), reduction, cells)
            for tokens, count, reduction, cells in zip(made, counts, reductions, kept, strict=True)
        ]

    def _windows(self, kwargs: Mapping[str, Any], modality: str) -> list[Windows]:
        """Windows of sound of each item."""
        return [
            [
                (mel, int(states), (int(first) + number) * self.config.audio_window_s)
                for number, (mel, states) in enumerate(
                    zip(mels.split(lengths.tolist(), dim=1), true, strict=True)
                )
            ]
            if len(lengths)
            else []
            for mels, lengths, true, first in zip(
                kwargs[f"{modality}_mel"],
                kwargs[f"{modality}_mel_lengths"],
                kwargs[f"{modality}_states"],
                kwargs[f"{modality}_first_window"],
                strict=True,
            )
        ]

    def _encode_windows(self, windows: Windows) -> list[torch.Tensor]:
        """Tokens of each window of sound; a call sees no more of them than fit the bound."""
        bound = self.encoder_max_patches
        most = max(1, bound // self.audio_tower.max_source_positions) if bound else len(windows)
        states: list[torch.Tensor] = []
        for begin in range(0, len(windows), most):
            batch = windows[begin : begin + most]
            encoded = self.audio_tower([mel for mel, _, _ in batch])
            states += [own[:true] for own, (_, true, _) in zip(encoded, batch, strict=True)]
        made: list[torch.Tensor] = self.audio_projector(states, [start for _, _, start in windows])
        return made

    def _no_tokens(self) -> torch.Tensor:
        weight = self.video_projector.projection[-1].weight
        return weight.new_empty(0, len(weight))

    # --- text -------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> torch.Tensor | IntermediateTensors:
        """Hidden states of the text model."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits of the text model."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Weights of a composer checkpoint."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(
            weights, mapper=self.hf_to_vllm_mapper
        )
        return loaded


def _joined(parts: Sequence[torch.Tensor], counts: Sequence[int]) -> list[torch.Tensor | None]:
    """Consecutive parts as one tensor for each count; None for a count of 0."""
    left = iter(parts)
    groups = [[next(left) for _ in range(count)] for count in counts]
    return [torch.cat(group) if group else None for group in groups]


def _interleaved(
    kinds: torch.Tensor, video: torch.Tensor, audio: torch.Tensor | None
) -> torch.Tensor:
    """Tokens of a segment in the order of its prompt."""
    if audio is None:
        return video
    embedded, counts = kinds[kinds != TEXT].unique_consecutive(return_counts=True)
    parts = []
    seen = heard = 0
    for kind, count in zip(embedded.tolist(), counts.tolist(), strict=True):
        if kind == AUDIO:
            parts.append(audio[heard : heard + count])
            heard += count
        else:
            parts.append(video[seen : seen + count])
            seen += count
    return torch.cat(parts)
