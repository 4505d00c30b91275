"""What a family's model makes of videos behind ``ReducedVideoModel``, as JSON on the last line.

Run by ``test_reduced_models.py`` in a process of its own: ``reduced_model.py DTYPE FAMILY...``. The
model is vLLM's, with the weights of the tiny checkpoint, but no engine is started.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

import numpy as np
import torch

from vllm_mm_ext.adapters.processors.fields import KEPT, REDUCTION
from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.video.reduce import reduce_tokens

GRIDS = [[6, 8, 12], [1, 8, 12], [5, 12, 6]]
REDUCTIONS = [
    Reduction(pool=2, temporal=2, static="merge", keep=0.3),
    NO_REDUCTION,
    Reduction(pool=3, temporal=3),
]
# Every group of processes is made through this file.
_STORE = tempfile.NamedTemporaryFile()  # noqa: SIM115
# A temporal grid has at most 96 patches, so that only whole grids are in the way of this bound.
MAX_PATCHES = 200


def load(family: str, dtype: str) -> tuple[Any, Any]:
    """A family's model, and vLLM's configuration it was made from."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import (
        initialize_model,
        process_weights_after_loading,
    )
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(
        str(checkpoint(family)),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=2048,
        limit_mm_per_prompt={"video": 4, "image": 1},
    ).create_engine_config()
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{_STORE.name}", 0, "gloo")
        # Which groups there are depends on the model.
        destroy_model_parallel()
        initialize_model_parallel(1, 1)
        # As ``get_model`` does it, which frees memory of an accelerator in between.
        with set_default_torch_dtype(config.model_config.dtype):
            model = initialize_model(vllm_config=config)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    return model, config


def difference(got: Any, expected: Any) -> float:
    assert [g.shape for g in got] == [e.shape for e in expected]
    return max(float((g - e).abs().max()) for g, e in zip(got, expected, strict=True))


@torch.inference_mode()
def answer_of(family: str, dtype: str) -> dict[str, Any]:
    from vllm.v1.worker.encoder_cudagraph import EncoderCudaGraphManager

    from vllm_mm_ext.adapters.models.reduced import ReducedVideoModel

    model, config = load(family, dtype)
    stock = type(model)
    if not issubclass(stock, ReducedVideoModel):
        model.__class__ = type(stock.__name__, (ReducedVideoModel, stock), {})
    vision = model.config.vision_config
    pixels = torch.randn(
        sum(t * h * w for t, h, w in GRIDS),
        3 * vision.temporal_patch_size * vision.patch_size**2,
        generator=torch.Generator().manual_seed(0),
    ).to(config.model_config.dtype)
    inputs = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor(GRIDS)}
    images = {"pixel_values": pixels, "image_grid_thw": torch.tensor(GRIDS)}
    calls: list[int] = []
    model.visual.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))

    model.encoder_max_patches = 0
    whole = model.embed_multimodal(**inputs)
    answer: dict[str, Any] = {"calls_unbounded": list(calls)}
    model.encoder_max_patches = MAX_PATCHES
    calls.clear()
    answer["difference_bounded"] = difference(model.embed_multimodal(**inputs), whole)
    answer["calls_bounded"] = list(calls)
    answer["difference_images"] = difference(model.embed_multimodal(**images), whole)
    answer["channels"] = whole[0].shape[1]

    rng = np.random.default_rng(0)
    kept, expected = [], []
    for tokens, (t, h, w), reduction in zip(whole, GRIDS, REDUCTIONS, strict=True):
        grid = (t, h // 2, w // 2)
        cells = np.prod(reduction.grid(*grid))
        chosen = np.sort(rng.permutation(cells)[: reduction.count(*grid)])
        selects = reduction.static != "none"
        kept.append(torch.from_numpy(chosen if selects else chosen[:0]))
        own = vision.out_hidden_size
        expected.append(reduce_tokens(tokens, grid, reduction, kept[-1] if selects else None, own))
    static = ["none", "merge", "prune"]
    fields = {
        REDUCTION: torch.tensor(
            [[r.pool, r.temporal, static.index(r.static), r.keep] for r in REDUCTIONS],
            dtype=torch.float64,
        ),
        KEPT: kept,
    }
    answer["difference_reduced"] = difference(model.embed_multimodal(**inputs, **fields), expected)
    answer["counts"] = [len(tokens) for tokens in expected]

    if hasattr(stock, "get_encoder_cudagraph_item_specs"):
        config.compilation_config.encoder_cudagraph_token_budgets = [4]
        config.compilation_config.encoder_cudagraph_max_vision_items_per_batch = 2
        # Items larger than every graph run eagerly: no graph is captured on a CPU.
        manager = EncoderCudaGraphManager(
            config, torch.device("cpu"), config.model_config.dtype, model
        )
        calls.clear()
        got = manager.execute({**inputs, **fields})
        answer["difference_manager"] = difference(got, expected)
        answer["calls_manager"] = list(calls)
    return answer


if __name__ == "__main__":
    os.environ["VLLM_PLUGINS"] = "mm_ext"
    print(json.dumps({family: answer_of(family, sys.argv[1]) for family in sys.argv[2:]}))
