"""Plans are for models whose layers all keep KV of one size."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from vllm_mm_ext.adapters.planning.loading import CannotPlanError
from vllm_mm_ext.adapters.planning.model_sizes import _kv_spec

FULL = FullAttentionSpec(block_size=16, num_kv_heads=4, head_size=64, dtype=torch.bfloat16)
NARROW = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
WINDOW = SlidingWindowSpec(
    block_size=16, num_kv_heads=4, head_size=64, dtype=torch.bfloat16, sliding_window=128
)


class Layer:
    def __init__(self, spec: KVCacheSpec | None) -> None:
        self._spec = spec

    def get_kv_cache_spec(self, _: object) -> KVCacheSpec | None:
        return self._spec


def config_of(*specs: KVCacheSpec | None) -> SimpleNamespace:
    layers = {str(number): Layer(spec) for number, spec in enumerate(specs)}
    return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))


def test_equal_layers_are_counted_without_those_that_keep_nothing() -> None:
    assert _kv_spec("m", config_of(FULL, None, FULL)) == (FULL, 2)


@pytest.mark.parametrize("specs", [(FULL, NARROW), (FULL, WINDOW), (WINDOW,), (None,)])
def test_layers_of_other_kinds_or_sizes_are_refused(specs: tuple[KVCacheSpec | None, ...]) -> None:
    with pytest.raises(CannotPlanError, match="of one size"):
        _kv_spec("m", config_of(*specs))
