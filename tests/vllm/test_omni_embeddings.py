"""Embeddings of video and sound that alternate: where stock vLLM puts them, without its search."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.models import qwen2_5_omni_thinker, qwen3_omni_moe_thinker
from vllm.multimodal.utils import set_mm_embedding_modality

from vllm_mm_ext.adapters.models.qwen2_5_omni import Qwen2_5OmniForConditionalGeneration
from vllm_mm_ext.adapters.models.qwen3_omni import Qwen3OmniMoeForConditionalGeneration

VIDEO, AUDIO, IMAGE, HIDDEN = 7, 8, 9, 4
STOCK = {
    Qwen2_5OmniForConditionalGeneration: (
        qwen2_5_omni_thinker,
        qwen2_5_omni_thinker.Qwen2_5OmniThinkerForConditionalGeneration,
    ),
    Qwen3OmniMoeForConditionalGeneration: (
        qwen3_omni_moe_thinker,
        qwen3_omni_moe_thinker.Qwen3OmniMoeThinkerForConditionalGeneration,
    ),
}


def small(family: Any) -> Any:
    """A family's model without anything but what places embeddings."""

    class Small(family):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.config = SimpleNamespace(
                video_token_id=VIDEO,
                video_token_index=VIDEO,
                audio_token_id=AUDIO,
                audio_token_index=AUDIO,
                image_token_id=IMAGE,
                text_config=SimpleNamespace(hidden_size=HIDDEN),
            )
            self.visual = SimpleNamespace(deepstack_visual_indexes=None)
            self.language_model = SimpleNamespace(embed_input_ids=None)

        def get_language_model(self) -> Any:
            return self.language_model

        def _embed_text_input_ids(self, ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return ids[:, None].expand(-1, HIDDEN).float().clone()

    return Small()


@pytest.mark.parametrize("family", STOCK, ids=lambda family: family.__name__)
def test_alternating_embeddings_go_where_stock_vllm_puts_them_without_its_search(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, stock = STOCK[family]
    ids = torch.tensor([1, 2, IMAGE, IMAGE, 3, *[VIDEO, VIDEO, AUDIO] * 40, 4, AUDIO, AUDIO, 5])
    placed = ids >= VIDEO
    rng = torch.Generator().manual_seed(1)
    embeddings = [
        set_mm_embedding_modality(torch.rand(count, HIDDEN, generator=rng), kind)
        for kind, count in (("image", 2), ("video", 80), ("audio", 40), ("audio", 2))
    ]
    model = small(family)
    expected = stock.embed_input_ids(model, ids, embeddings, is_multimodal=placed)

    def search(*_: Any) -> bool:
        raise AssertionError("each token is asked for by itself")

    monkeypatch.setattr(module, "check_interleaved_audio_video", search)
    found = model.embed_input_ids(ids, embeddings, is_multimodal=placed)
    assert torch.equal(found, expected)
    assert module.check_interleaved_audio_video is search
