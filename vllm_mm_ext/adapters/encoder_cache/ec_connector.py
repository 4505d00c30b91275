"""vLLM's interface to the host tier of the encoder cache: an EC connector with role ``ec_both``.

Named by ``--ec-transfer-config``. This one serves vLLM's first model runner (CPU, and CUDA without
Model Runner V2); where the second one runs, ``cuda_connector.py`` takes its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
)

from vllm_mm_ext.adapters.encoder_cache.host_store import HostStore
from vllm_mm_ext.adapters.encoder_cache.manager import attach_host_tier
from vllm_mm_ext.adapters.encoder_cache.mm_features import feature_cost, output_bytes
from vllm_mm_ext.adapters.encoder_cache.startup import check_host_tier, host_bytes
from vllm_mm_ext.adapters.names.encoder_cache_names import (
    CUDA_HOST_TIER_NAMES,
    DEVICE_TIER_NAMES,
    HOST_TIER_NAMES,
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
    """Keeps nothing, where vLLM has changed underneath the host tier: the device tier is alone."""

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        # The rest is what the engine must not do with any host tier.
        check_host_tier(vllm_config)

    def has_cache_item(self, *_: Any, **__: Any) -> bool:
        """Nothing is ever there."""
        return False

    def update_state_after_alloc(self, *_: Any, **__: Any) -> None:
        """Nothing to plan."""

    def build_connector_meta(self, *_: Any, **__: Any) -> ECConnectorMetadata:
        """Nothing to do."""
        return ECConnectorMetadata()

    def start_load_caches(self, *_: Any, **__: Any) -> None:
        """Nothing to load."""

    def save_caches(self, *_: Any, **__: Any) -> None:
        """Nothing is kept."""


class MMExtECConnector(ECConnectorBase):  # type: ignore[misc]
    """The host tier: outputs are copied when encoded, and loaded where the device lost them."""

    def __new__(cls, vllm_config: VllmConfig, role: ECConnectorRole) -> Any:
        """The connector for the engine's model runner, which may be of another class."""
        second = vllm_config.use_v2_model_runner
        names = CUDA_HOST_TIER_NAMES if second else HOST_TIER_NAMES
        changed = problem((*DEVICE_TIER_NAMES, *names))
        if changed is not None:
            logger.warning("mm_ext: the host tier of the encoder cache is off: %s", changed)
            return NoHostTier(vllm_config, role)
        if second:
            from vllm_mm_ext.adapters.encoder_cache.cuda_connector import CudaECConnector

            return CudaECConnector(vllm_config, role)
        return super().__new__(cls)

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        check_host_tier(vllm_config)
        if role == ECConnectorRole.SCHEDULER:
            self._tier = HostTier(host_bytes(vllm_config))
            # Measured only once the model is there, which is before the scheduler.
            self._sizes: OutputBytes = output_bytes(vllm_config)
            attach_host_tier(vllm_config, self)
        else:
            self._store = HostStore()

    # In the scheduler.

    def has_cache_item(self, identifier: str) -> bool:
        """Whether an item can be loaded instead of encoded."""
        return identifier in self._tier

    def used(self, key: str) -> None:
        """The device tier had an item."""
        self._tier.used(key)

    def cancel(self, key: str) -> None:
        """The device tier gave up an item that it allocated in this pass."""
        self._tier.cancel(key)

    def reset(self) -> None:
        """Forget everything."""
        self._tier.reset()

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """The device tier has room for an item now."""
        feature = request.mm_features[index]
        if feature.modality == "prompt_embeds":
            return  # The client's own, nothing is encoded.
        size = feature.mm_position.get_num_embeds() * self._sizes.of(feature.modality)
        cost = feature_cost(feature)
        self._tier.allocated(feature.identifier, size, cost, request.request_id, index)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ECConnectorMetadata:
        """End the pass: what the worker has to do."""
        if not scheduler_output.total_num_scheduled_tokens:
            # The runner does not look at it then.
            self._tier.skip()
            return HostPlanMetadata(HostPlan())
        return HostPlanMetadata(self._tier.plan(scheduler_output.scheduled_encoder_inputs))

    # In the worker.

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **_: Any) -> None:
        """Drop what the scheduler evicted, and put what it wants into the device's cache."""
        plan = self._plan()
        self._store.drop(None if plan.clear else plan.drops)
        for key in plan.loads:
            encoder_cache[key] = self._store.load(key)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **_: Any) -> None:
        """Keep what was just encoded, where the scheduler has made room for it."""
        if mm_hash in self._plan().saves:
            self._store.save(mm_hash, encoder_cache[mm_hash])

    def _plan(self) -> HostPlan:
        plan: HostPlan = self._get_connector_metadata().plan
        return plan
