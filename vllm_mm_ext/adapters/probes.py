"""Features used once without a model, for what names and parameters of vLLM cannot tell.

Each raises ``IncompatibleError`` where the feature would not do what it should.
"""

from __future__ import annotations

import numpy as np
from vllm.multimodal.hasher import MultiModalHasher

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.media.request_budgets import check_budgets
from vllm_mm_ext.adapters.names.names_check import IncompatibleError
from vllm_mm_ext.media.payload import Waveform


def connector() -> None:
    """The media connector charges a request's budgets, and vLLM's loader names its frames."""
    check_budgets()
    stock = vllm_compat.StockLoader("opencv", {"num_frames": 4})
    indices = stock.indices(100, 25.0)
    if len(indices) != 4 or stock.metadata(100, 25.0, indices)["frames_indices"] != indices:
        raise IncompatibleError("vLLM's video loader does not say which frames it would read")


def hashing() -> None:
    """vLLM's hasher takes a waveform by its digest."""
    names = set()
    for sample in (0, 1):
        sound = Waveform(np.full(4, sample, np.float32), digest="same", rate=1)
        names.add(MultiModalHasher.hash_kwargs("blake3", audio=sound))
    if len(names) > 1:
        raise IncompatibleError("vLLM reads the samples of a waveform whose digest is known")
