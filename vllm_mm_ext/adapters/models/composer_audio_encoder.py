"""vLLM's Whisper encoder over windows of any length, none of which sees another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.model_executor.models.whisper import WhisperEncoder

_KEY = ".self_attn.k_proj.weight"


class WindowEncoder(WhisperEncoder):  # type: ignore[misc]
    """Windows side by side in one sequence, with attention within each."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={".fc1.": ".mlp.fc1.", ".fc2.": ".mlp.fc2."},
        orig_to_new_stacked={
            ".self_attn.q_proj": (".self_attn.qkv_proj", "q"),
            ".self_attn.k_proj": (".self_attn.qkv_proj", "k"),
            ".self_attn.v_proj": (".self_attn.qkv_proj", "v"),
        },
    )

    def forward(self, windows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Encoder frames ``[ceil(frames / 2), d_model]`` of each window.

        Args:
            windows: Log-mel ``[bins, frames]`` of each, padding included where there is any.
        """
        embedded = []
        for window in windows:
            x = F.gelu(self.conv1(window[None]))
            x = F.gelu(self.conv2(x))[0].transpose(0, 1)
            embedded.append(x + self.embed_positions.weight[: len(x)].to(x.dtype))
        lengths = [len(x) for x in embedded]
        hidden = torch.cat(embedded)
        attention = self.layers[0].self_attn.attn
        backend, device = attention.attn_backend, hidden.device
        bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        within = {
            "sequence_lengths": MMEncoderAttention.maybe_compute_seq_lens(backend, bounds, device),
            "max_seqlen": torch.tensor(
                MMEncoderAttention.compute_max_seqlen(backend, bounds), dtype=torch.int32
            ),
            "cu_seqlens": MMEncoderAttention.maybe_recompute_cu_seqlens(
                backend,
                bounds,
                hidden.shape[1],
                get_tensor_model_parallel_world_size(),
                device,
            ),
        }
        for layer in self.layers:
            hidden = layer(hidden, **within)
        return list(self.layer_norm(hidden).split(lengths))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Weights as transformers names them."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(
            _with_key_bias(weights), mapper=self.hf_to_vllm_mapper
        )
        return loaded


def _with_key_bias(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whisper's keys have no bias; vLLM's fused projection has one for all three."""
    for name, weight in weights:
        yield name, weight
        if name.endswith(_KEY):
            yield name.removesuffix("weight") + "bias", torch.zeros(len(weight), dtype=weight.dtype)
