"""The media with which vLLM warms a model's processor up before a server answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vllm_mm_ext.adapters.planning.loading import LoadedModel


def warm_up_bytes(loaded: LoadedModel, modalities: Iterable[str]) -> int:
    """Bytes of the pictures and samples that vLLM makes up, one medium of each modality.

    Args:
        loaded: The model.
        modalities: Those that the server takes.
    """
    counts = dict.fromkeys(modalities, 1)
    if not counts:
        return 0
    builder = loaded.processor.dummy_inputs
    return _bytes(builder.get_dummy_mm_data(loaded.config.model_config.max_model_len, counts, {}))


def _bytes(made: Any) -> int:
    if isinstance(made, Mapping):
        return sum(map(_bytes, made.values()))
    if isinstance(made, (list, tuple)):
        return sum(map(_bytes, made))
    if isinstance(made, np.ndarray):
        return int(made.nbytes)
    # A picture of PIL.
    size = getattr(made, "size", None)
    return size[0] * size[1] * len(made.getbands()) if isinstance(size, tuple) else 0
