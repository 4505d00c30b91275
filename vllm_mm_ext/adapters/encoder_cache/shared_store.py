"""vLLM's example connector (files in a shared directory) made fit for service.

The files, their names and their bound are ``OutputStore``'s. What is named to the connector is
stored, also where the producer has had it in its own encoder cache for long.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import safetensors.torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorMetadata, ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.example_connector import ECExampleConnector
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from vllm_mm_ext.adapters.encoder_cache.transport_options import shared_directory, store_bytes
from vllm_mm_ext.adapters.vllm_compat import logger
from vllm_mm_ext.fleet.output_store import OutputStore

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_TENSOR = "ec_cache"


@dataclass
class StoreMetadata(ECConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the worker for one step.

    Attributes:
        loads: By identifier, the file to read.
        publishes: Identifiers to be in the store, if the worker has them.
    """

    loads: dict[str, str] = field(default_factory=dict)
    publishes: tuple[str, ...] = ()


class SharedStoreConnector(ECExampleConnector):  # type: ignore[misc]
    """Encoder outputs in a directory that producers write and consumers read.

    Attributes:
        files: The directory.
        stored: Outputs that this worker has written since its start.
    """

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        parallel = vllm_config.parallel_config
        reader = None
        if role == ECConnectorRole.SCHEDULER:
            transfer = vllm_config.ec_transfer_config
            # Engines may have been given the same id.
            reader = f"{transfer.engine_id}-{parallel.data_parallel_index}-{uuid4().hex}"
        self.files = OutputStore(shared_directory(vllm_config), store_bytes(vllm_config), reader)
        # All ranks of a tensor-parallel group have the same outputs.
        self._writes = self.is_producer and parallel.rank == 0
        self._loads: dict[str, str] = {}
        self._publishes: dict[str, None] = {}
        self._told_of_failure = False
        self.stored = 0

    # --- in the scheduler -------------------------------------------------------------------------

    def has_cache_item(self, identifier: str, *, awaited: bool = False) -> bool:
        """Whether an output can be read; if so, it stays readable for this step.

        Args:
            identifier: Of the item.
            awaited: A request waits for it, so it is looked for more often.
        """
        return self.files.hold(identifier, awaited=awaited)

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """Plan the load of an output that was found."""
        key = request.mm_features[index].identifier
        if self.files.hold(key):
            self._loads[key] = str(self.files.held_path(key))

    def look_again(self) -> None:
        """Note that outputs which were not there a moment ago may be there now."""
        self.files.look_again()

    def publish(self, key: str) -> None:
        """Have an output stored that the producer has in its encoder cache, or is about to make."""
        self._publishes[key] = None

    def cancel(self, key: str) -> None:
        """Drop the planned load of an output that the device tier gave up in this pass."""
        self._loads.pop(key, None)

    def forget(self, keys: Iterable[str]) -> None:
        """Remove outputs from the store."""
        for key in keys:
            self.files.forget(key)

    def reset(self) -> None:
        """Empty the store: what it holds was made with other weights."""
        self.files.empty()

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ECConnectorMetadata:
        """End the scheduling pass."""
        if not scheduler_output.total_num_scheduled_tokens:
            # The runner ignores the plan of a step without tokens.
            return StoreMetadata()
        meta = StoreMetadata(self._loads, tuple(self._publishes))
        self._loads, self._publishes = {}, {}
        self.files.release()
        return meta

    def shutdown(self) -> None:
        """Let go of the files that are held."""
        self.files.close()

    # --- in the worker ----------------------------------------------------------------------------

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **_: Any) -> None:
        """Read what the scheduler planned into the encoder cache."""
        device = current_platform.device_type
        if current_platform.is_cuda_alike():
            device = f"{device}:{current_platform.current_device()}"
        for key, path in self._store_plan().loads.items():
            with gpu_sync_allowed():
                encoder_cache[key] = safetensors.torch.load_file(path, device=device)[_TENSOR]

    def start_save_caches(self, encoder_cache: dict[str, torch.Tensor], **_: Any) -> None:
        """Store what requests named and the encoder cache has."""
        for key in self._store_plan().publishes:
            if key in encoder_cache:
                self._store(key, encoder_cache[key])

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **_: Any) -> None:
        """Store what was just made and is named: vLLM tells of embeddings of clients as well."""
        if mm_hash in self._store_plan().publishes:
            self._store(mm_hash, encoder_cache[mm_hash])

    def _store(self, key: str, output: torch.Tensor) -> None:
        if not self._writes:
            return

        def write(path: Path) -> None:
            with gpu_sync_allowed():
                # Contiguous and by itself: a view would bring all of its storage along.
                tensors = {_TENSOR: output.detach().to("cpu", copy=True).contiguous()}
            safetensors.torch.save_file(tensors, path)

        try:
            self.stored += self.files.put(key, write)
            self._told_of_failure = False
        except OSError as error:
            # Consumers encode what they do not find.
            if not self._told_of_failure:
                logger.warning("mm_ext: encoder outputs cannot be stored: %s", error)
            self._told_of_failure = True

    def _store_plan(self) -> StoreMetadata:
        meta: StoreMetadata = self._get_connector_metadata()
        return meta
