"""vLLM's example connector (files in a shared directory) made fit for service.

The files, their names and their bound are ``OutputStore``'s. What is named to the connector is
stored, also where the producer has had it in its own encoder cache for long.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import safetensors.torch
import torch
from safetensors import SafetensorError
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorMetadata, ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.example_connector import ECExampleConnector
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from vllm_mm_ext.adapters.encoder_cache.failed_loads import FailedLoads
from vllm_mm_ext.adapters.encoder_cache.mm_features import output_bytes
from vllm_mm_ext.adapters.encoder_cache.transport_options import shared_directory, store_bytes
from vllm_mm_ext.adapters.vllm_compat import logger
from vllm_mm_ext.fleet.output_store import OutputStore

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_TENSOR = "ec_cache"


class Load(NamedTuple):
    """An output to read: its file, and its shape."""

    path: str
    shape: tuple[int, int]


@dataclass
class StoreMetadata(ECConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the worker for one step.

    Attributes:
        loads: By identifier, what to read.
        publishes: Identifiers to be in the store, if the worker has them.
        drops: Identifiers of what could not be read: the worker drops what it has of them first.
    """

    loads: dict[str, Load] = field(default_factory=dict)
    publishes: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()


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
        self._sizes = output_bytes(vllm_config)
        self._dtype: torch.dtype = vllm_config.model_config.dtype
        self._loads: dict[str, Load] = {}
        # What the last plans name, the oldest first: as many as may be under way.
        self._planned: deque[tuple[str, ...]] = deque()
        self._most_plans = int(vllm_config.max_concurrent_batches)
        self._publishes: dict[str, None] = {}
        self._drops: dict[str, None] = {}
        self._told_of_failure = False
        self.stored = 0
        # In a worker: outputs that could not be read, until the scheduler has them dropped, and
        # those that the scheduler was not told of yet.
        self._lost: set[str] = set()
        self._failed: set[str] = set()

    # --- in the scheduler -------------------------------------------------------------------------

    def has_cache_item(self, identifier: str, *, awaited: bool = False) -> bool:
        """Whether an output can be read; if so, it stays readable for this step.

        Args:
            identifier: Of the item.
            awaited: A request waits for it, so it is looked for more often.
        """
        return self.files.hold(identifier, awaited=awaited)

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """Plan the load of an output that was found; its file stays until it must be read."""
        feature = request.mm_features[index]
        key = feature.identifier
        if key not in self._loads and self.files.pin(key):
            width = self._sizes.of(feature.modality) // self._dtype.itemsize
            shape = feature.mm_position.get_num_embeds(), width
            self._loads[key] = Load(str(self.files.held_path(key)), shape)

    def look_again(self) -> None:
        """Note that outputs which were not there a moment ago may be there now."""
        self.files.look_again()

    def publish(self, key: str) -> None:
        """Have an output stored that the producer has in its encoder cache, or is about to make."""
        self._publishes[key] = None

    def cancel(self, key: str) -> None:
        """Drop the planned load of an output that the device tier gave up in this pass."""
        if self._loads.pop(key, None) is not None:
            self.files.unpin(key)

    def forget(self, keys: Iterable[str]) -> None:
        """Remove outputs from the store."""
        for key in keys:
            self.files.forget(key)

    def give_up(self, keys: Iterable[str]) -> None:
        """Forget outputs that could not be read, and have the worker drop what it put there."""
        keys = list(keys)
        self.forget(keys)
        self._drops |= dict.fromkeys(keys)

    def reset(self) -> None:
        """Empty the store: what it holds was made with other weights."""
        for key in (*chain.from_iterable(self._planned), *self._loads):
            self.files.unpin(key)
        self._planned.clear()
        self._loads.clear()
        self.files.empty()

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ECConnectorMetadata:
        """End the scheduling pass."""
        if not scheduler_output.total_num_scheduled_tokens:
            # The runner ignores the plan of a step without tokens.
            return StoreMetadata()
        meta = StoreMetadata(self._loads, tuple(self._publishes), tuple(self._drops))
        self._planned.append(tuple(self._loads))
        self._loads, self._publishes, self._drops = {}, {}, {}
        if len(self._planned) > self._most_plans:
            # vLLM makes a plan when one that is so much older has been executed.
            for key in self._planned.popleft():
                self.files.unpin(key)
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
        for key, load in self._store_plan().loads.items():
            try:
                encoder_cache[key] = self._read(key, load, device)
            except (OSError, SafetensorError, KeyError) as error:
                logger.error("mm_ext: an encoder output in the store cannot be read: %r", error)
                # The step goes on, and what it brings is not used (``failed_loads``).
                encoder_cache[key] = torch.zeros(load.shape, dtype=self._dtype, device=device)
                self._lost.add(key)
                self._failed.add(key)

    def drop_lost(self, encoder_cache: dict[str, torch.Tensor]) -> tuple[str, ...]:
        """Drop what the scheduler has given up, before anything else in a step; tell what it was.

        What vLLM's second model runner has in its encoder cache it does not encode.
        """
        drops = self._store_plan().drops
        self._lost.difference_update(drops)
        for key in drops:
            encoder_cache.pop(key, None)
        return drops

    def build_connector_worker_meta(self) -> FailedLoads | None:
        """Tell the scheduler of what could not be read in this step."""
        failed, self._failed = frozenset(self._failed), set()
        return FailedLoads(failed) if failed else None

    def _read(self, key: str, load: Load, device: str) -> torch.Tensor:
        with gpu_sync_allowed():
            try:
                return _tensor(load.path, device)
            except FileNotFoundError:
                # Another server has taken this one for dead. The store may still have it.
                return _tensor(self.files.path(key), device)

    def start_save_caches(self, encoder_cache: dict[str, torch.Tensor], **_: Any) -> None:
        """Store what requests named and the encoder cache has."""
        for key in self._store_plan().publishes:
            if key in encoder_cache and key not in self._lost:
                self._store(key, encoder_cache[key])

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **_: Any) -> None:
        """Store what was just made and is named: vLLM tells of embeddings of clients as well."""
        if mm_hash in self._store_plan().publishes and mm_hash not in self._lost:
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
            if self.files.put(key, write):
                self.stored += 1
                self._told_of_failure = False
        except OSError as error:
            # Consumers encode what they do not find.
            if not self._told_of_failure:
                logger.warning("mm_ext: encoder outputs cannot be stored: %s", error)
            self._told_of_failure = True

    def _store_plan(self) -> StoreMetadata:
        meta: StoreMetadata = self._get_connector_metadata()
        return meta


def _tensor(path: str | Path, device: str) -> torch.Tensor:
    # Not mapped: where a part of a mapped file cannot be read, a signal would end the worker.
    found: torch.Tensor = safetensors.torch.load_file(path, device=device, backend="pread")[_TENSOR]
    return found
