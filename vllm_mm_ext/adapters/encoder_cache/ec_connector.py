"""vLLM's interface to the host tier of the encoder cache: an EC connector with role ``ec_both``.

``--ec-transfer-config`` names this connector. It serves vLLM's first model runner (CPU, and CUDA
without Model Runner V2). With the second model runner ``cuda_connector.py`` takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
)

from vllm_mm_ext.adapters.encoder_cache.host_store import HostStore
from vllm_mm_ext.adapters.encoder_cache.manager import attach_host_tier
from vllm_mm_ext.adapters.encoder_cache.mm_features import (
    PROMPT_EMBEDS,
    feature_cost,
    output_bytes,
)
from vllm_mm_ext.adapters.encoder_cache.startup import check_host_tier, host_bytes
from vllm_mm_ext.adapters.encoder_cache.transport_options import CPU, transport_of
from vllm_mm_ext.adapters.names.encoder_cache_names import (
    CUDA_HOST_TIER_NAMES,
    DEVICE_TIER_NAMES,
    HOST_TIER_NAMES,
    TRANSPORT_NAMES,
)
from vllm_mm_ext.adapters.names.names_check import problem
from vllm_mm_ext.adapters.vllm_compat import logger
from vllm_mm_ext.policies.encoder_cache.host_tier import HostPlan, HostTier

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from vllm_mm_ext.policies.encoder_cache.items import OutputBytes


@dataclass
class HostPlanMetadata(ECConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the worker for one step."""

    plan: HostPlan


class NoHostTier(ECConnectorBase):  # type: ignore[misc]
    """A connector that keeps nothing, for a vLLM that the host tier does not fit."""

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        # The engine must not run in these configurations with any host tier.
        check_host_tier(vllm_config)

    def has_cache_item(self, *_: Any, **__: Any) -> bool:
        """Whether an item can be loaded: never."""
        return False

    def update_state_after_alloc(self, *_: Any, **__: Any) -> None:
        """Plan nothing."""

    def build_connector_meta(self, *_: Any, **__: Any) -> ECConnectorMetadata:
        """Ask the worker for nothing."""
        return ECConnectorMetadata()

    def start_load_caches(self, *_: Any, **__: Any) -> None:
        """Load nothing."""

    def save_caches(self, *_: Any, **__: Any) -> None:
        """Keep nothing."""


class MMExtECConnector(ECConnectorBase):  # type: ignore[misc]
    """The host tier: copies encoder outputs when they are made, and loads what the device lost."""

    def __new__(cls, vllm_config: VllmConfig, role: ECConnectorRole) -> Any:
        """Make the connector that fits the engine's model runner, perhaps of another class."""
        second = vllm_config.use_v2_model_runner
        transport = transport_of(vllm_config.ec_transfer_config)
        names = CUDA_HOST_TIER_NAMES if second else HOST_TIER_NAMES
        shared = () if transport is None else TRANSPORT_NAMES
        changed = problem((*DEVICE_TIER_NAMES, *names, *shared))
        if changed is not None:
            logger.warning("mm_ext: the host tier of the encoder cache is off: %s", changed)
            return NoHostTier(vllm_config, role)
        if transport not in (None, CPU):
            from vllm_mm_ext.adapters.encoder_cache.transport_connector import TransportConnector

            return super().__new__(TransportConnector)
        if second:
            from vllm_mm_ext.adapters.encoder_cache.cuda_connector import CudaECConnector

            return CudaECConnector(vllm_config, role)
        return super().__new__(cls)

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        check_host_tier(vllm_config)
        if role == ECConnectorRole.SCHEDULER:
            self._tier = HostTier(host_bytes(vllm_config))
            # vLLM has loaded the model by now, and so has measured the widths of its outputs.
            self._sizes: OutputBytes = output_bytes(vllm_config)
            attach_host_tier(vllm_config, self)
        else:
            self._store = HostStore()

    # In the scheduler.

    def has_cache_item(self, identifier: str) -> bool:
        """Whether an item can be loaded instead of encoded."""
        return identifier in self._tier

    def embeddings_of(self, identifier: str, modality: str) -> int | None:
        """Number of an item's embeddings in the tier; None if the item is not there."""
        size = self._tier.size(identifier)
        return None if size is None else size // self._sizes.of(modality)

    def follow_device(self, holds: Callable[[str], bool]) -> None:
        """The device tier makes no difference here."""

    def awaits(self, request: Request, index: int) -> bool:  # noqa: ARG002 - the interface
        """Whether an item that is not on the device is being encoded elsewhere: never."""
        return False

    def secured(self, request: Request, index: int) -> bool:  # noqa: ARG002 - the interface
        """Whether a request may use an item that is on the device: items come whole."""
        return True

    def used(self, key: str) -> None:
        """Note that a request found an item in the device tier."""
        self._tier.used(key)

    def cancel(self, key: str) -> None:
        """Note that the device tier gave up an item that it allocated in this pass."""
        self._tier.cancel(key)

    def reset(self) -> None:
        """Forget all items."""
        self._tier.reset()

    def items(self) -> list[tuple[str, int]]:
        """Key and bytes of each item."""
        return self._tier.items()

    def forget(self, keys: Iterable[str]) -> None:
        """Forget items that no request uses; ``forget_in_worker`` is called for them as well."""
        self._tier.forget(keys)

    def forget_in_worker(self, keys: Iterable[str]) -> None:
        """Overwrite and drop items, in the worker."""
        self._store.wipe(keys)

    def figures(self) -> dict[str, float]:
        """Counts since the start, and what the tier holds, in bytes and items."""
        return self._tier.figures

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """Plan the load or save of an item for which the device tier has space now."""
        feature = request.mm_features[index]
        if feature.modality == PROMPT_EMBEDS:
            return
        size = feature.mm_position.get_num_embeds() * self._sizes.of(feature.modality)
        cost = feature_cost(feature)
        self._tier.allocated(feature.identifier, size, cost, request.request_id, index)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ECConnectorMetadata:
        """End the scheduling pass, and tell what the worker has to do."""
        if not scheduler_output.total_num_scheduled_tokens:
            # The runner ignores the plan of a step without tokens.
            self._tier.skip()
            return HostPlanMetadata(HostPlan())
        return HostPlanMetadata(self._tier.plan(scheduler_output.scheduled_encoder_inputs))

    # In the worker.

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **_: Any) -> None:
        """Drop what the scheduler evicted, and load what it planned into the device's cache."""
        plan = self._plan()
        self._store.drop(None if plan.clear else plan.drops)
        for key in plan.loads:
            encoder_cache[key] = self._store.load(key)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **_: Any) -> None:
        """Copy an item that was just encoded, if the scheduler planned its save."""
        if mm_hash in self._plan().saves:
            self._store.save(mm_hash, encoder_cache[mm_hash])

    def _plan(self) -> HostPlan:
        plan: HostPlan = self._get_connector_metadata().plan
        return plan
