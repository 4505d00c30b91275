"""One of two processes that serve a model, as vLLM's workers on two GPUs: the bytes that it loads.

python tests/support/divided_weights.py RANK TP ADDRESS FOLDER
"""

from __future__ import annotations

import os
import sys

from vllm_mm_ext import plugin
from vllm_mm_ext.adapters.planning import model_sizes
from vllm_mm_ext.adapters.planning.loading import load


def main(rank: int, tp: int, address: str, folder: str) -> None:
    """Build the model's share on the ``meta`` device and print its bytes.

    Args:
        rank: 0 or 1.
        tp: 2: both share a replica; 1: each is a replica.
        address: A file that neither has made.
        folder: The model's files.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    # vLLM's executor gives its workers a name for the memory that they share.
    os.environ["VLLM_DIST_IDENT"] = f"divided-{os.getppid()}"
    plugin.register()
    config = load(folder, context=None, mm_processor_kwargs={}, settings={}).config
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(2, rank, address, rank, "gloo")
        config.parallel_config.data_parallel_size = 2 // tp
        parallel_state.ensure_model_parallel_initialized(tp, 1)
        model = model_sizes._on_meta(config)
    print(model_sizes._bytes([*model.parameters(), *model.buffers()]))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
