"""vLLM's KV offloading where there is no GPU: its connector and manager, with copies made here.

vLLM's own copies are made by CUDA. A class of this module stands in for them, named by
``spec_module_path`` of ``kv_connector_extra_config``.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class Copies(OffloadingWorker):  # type: ignore[misc]
    """Copies blocks between the KV cache and memory of its own, at once.

    Attributes:
        stored, loaded: Blocks copied so far, by all workers of this process.
    """

    stored = 0
    loaded = 0

    def __init__(self, kv_caches: CanonicalKVCaches, chunks: int) -> None:
        self._blocks = [one.tensor for one in kv_caches.tensors]
        self._chunks = [torch.empty((chunks, t.shape[1]), dtype=t.dtype) for t in self._blocks]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for block, chunk in zip(self._blocks, self._chunks, strict=True):
            chunk[dst_spec.block_ids.tolist()] = block[src_spec.block_ids.tolist()]
        Copies.stored += len(src_spec.block_ids)
        return self._end(job_id)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for block, chunk in zip(self._blocks, self._chunks, strict=True):
            block[dst_spec.block_ids.tolist()] = chunk[src_spec.block_ids.tolist()]
        Copies.loaded += len(dst_spec.block_ids)
        return self._end(job_id)

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is under way."""

    def _end(self, job_id: int) -> bool:
        self._done.append(TransferResult(job_id, success=True))
        return True


class OnCpu(CPUOffloadingSpec):  # type: ignore[misc]
    """vLLM's offloading to host memory, with these copies."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        return Copies(kv_caches, self.num_chunks)
