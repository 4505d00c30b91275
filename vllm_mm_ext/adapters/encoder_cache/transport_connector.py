"""The host tier in front of a transport: encoder outputs that come from, or go to, other instances.

The transport is a connector of vLLM's. It sits behind both tiers: what the device or the host has
is not asked for elsewhere, and what comes from elsewhere is kept in both. An instance may produce
outputs, consume them, or both.
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

from vllm_mm_ext.adapters.encoder_cache.bare_items import Bare
from vllm_mm_ext.adapters.encoder_cache.ec_connector import MMExtECConnector
from vllm_mm_ext.adapters.encoder_cache.instance_plan import join_shared_store
from vllm_mm_ext.adapters.encoder_cache.mm_features import PROMPT_EMBEDS, feature_cost
from vllm_mm_ext.adapters.encoder_cache.shared_store import SharedStoreConnector
from vllm_mm_ext.adapters.encoder_cache.startup import encoder_settings
from vllm_mm_ext.adapters.encoder_cache.transport_options import (
    JOB,
    MOONCAKE,
    SHARED_STORE,
    is_shared,
    transport_of,
)
from vllm_mm_ext.adapters.vllm_compat import logger
from vllm_mm_ext.policies.encoder_cache.expectations import Expectations
from vllm_mm_ext.policies.encoder_cache.host_tier import HostPlan

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass
class TransportMetadata(ECConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the worker for one step, of the host tier and of the transport."""

    plan: HostPlan
    transport: ECConnectorMetadata


def make_transport(vllm_config: VllmConfig, role: ECConnectorRole) -> ECConnectorBase:
    """The transport's side for a role, after a check that this instance fits the others."""
    name = transport_of(vllm_config.ec_transfer_config)
    if name == SHARED_STORE:
        join_shared_store(vllm_config)
        return SharedStoreConnector(vllm_config, role)
    assert name == MOONCAKE, name
    from vllm.distributed.ec_transfer.ec_connector.mooncake_ec_connector import ECMooncakeConnector

    return ECMooncakeConnector(vllm_config, role)


def _job_of(request: Request) -> str | None:
    """The job that an encoder was given for a request; None without one."""
    params = request.ec_transfer_params
    job = params.get(JOB) if isinstance(params, dict) else None
    return job if isinstance(job, str) else None


class TransportConnector(MMExtECConnector):
    """Both tiers, and behind them the transport that ``ec_connector_extra_config`` names.

    Attributes:
        transport: vLLM's connector, or the plugin's version of it.
    """

    transport: ECConnectorBase

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        self.transport = make_transport(vllm_config, role)
        self._shared = self.transport if isinstance(self.transport, SharedStoreConnector) else None
        self._expectations = Expectations(encoder_settings(vllm_config).encoder_wait_s)
        self._on_device: Callable[[str], bool] = lambda _: False
        self._bare: Bare | None = None
        if self._shared is not None and role == ECConnectorRole.SCHEDULER:
            self._bare = Bare(
                self._shared.files,
                self._expects,
                lambda key: self._on_device(key) or key in self._tier,
            )
        self._counts = dict.fromkeys(("loaded", "missed", "waits_ended"), 0)
        # The runner's encoder cache, once a step has begun in a worker.
        self._device_outputs: dict[str, torch.Tensor] = {}

    # --- in the scheduler -------------------------------------------------------------------------

    @property
    def loads_may_fail(self) -> bool:
        """Whether requests may have to begin again, as an output that was found is lost."""
        return self._shared is not None

    def has_cache_item(self, identifier: str) -> bool:
        """Whether an item can be loaded instead of encoded, from the host or from elsewhere."""
        return identifier in self._tier or self._is_elsewhere(identifier)

    def seems_there(self, identifier: str) -> bool:
        """As ``has_cache_item``, but briefer, and for plans of the scheduler: nothing is held."""
        if self._shared is None:
            return self.has_cache_item(identifier)
        return identifier in self._tier or (
            is_shared(identifier) and self._shared.files.seems_there(identifier)
        )

    def _is_elsewhere(self, key: str) -> bool:
        return is_shared(key) and bool(self.transport.has_cache_item(key))

    def follow_device(self, holds: Callable[[str], bool]) -> None:
        """Take note of the device tier, which is built later.

        Args:
            holds: Whether an item is on the device.
        """
        self._on_device = holds

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        """Whether a request can get on: the item that it has reached is not awaited."""
        if not self.transport.ensure_cache_available(request, num_computed_tokens):
            return False
        if self._bare is not None and self._bare.holds_up(request, num_computed_tokens):
            return False
        if _job_of(request) is None or num_computed_tokens >= request.num_prompt_tokens:
            return True
        for index, feature in enumerate(request.mm_features):
            place = feature.mm_position
            if place.offset <= num_computed_tokens < place.offset + place.length and not (
                self._on_device(feature.identifier)
            ):
                return not self.awaits(request, index)
        return True

    def awaits(self, request: Request, index: int) -> bool:
        """Whether an item that is not on the device is being encoded elsewhere for a request."""
        bare = None if self._bare is None else self._bare.awaits(request, index)
        if bare is not None:
            return bare
        feature = request.mm_features[index]
        # Embeddings of a prompt come with the request.
        if _job_of(request) is None or feature.modality == PROMPT_EMBEDS:
            return False
        key = feature.identifier
        if not is_shared(key) or self.has_cache_item(key):
            return False
        if self._shared is not None and self._shared.has_cache_item(key, awaited=True):
            return False
        return self._expects(request, index)

    def _expects(self, request: Request, index: int) -> bool:
        """Whether an item may still come of what an encoder was asked for a request."""
        job = _job_of(request)
        if job is None:
            return False
        before = self._expectations.timed_out
        found = self._expectations.expects(request.request_id, job, index)
        if self._expectations.timed_out > before:
            self._counts["waits_ended"] += 1
            logger.warning(
                "mm_ext: an encoder instance delivers nothing for a request; this instance "
                "encodes its media itself"
            )
        return found

    def secured(self, request: Request, index: int) -> bool:
        """Whether a request may use an item that is on the device: it can be had again."""
        return self._bare is None or self._bare.is_secured(request, index)

    def encode_over(self, job: str) -> None:
        """Note that nothing more comes of what an encoder was asked."""
        self._expectations.over(job)
        if self._shared is not None:
            self._shared.look_again()

    def used(self, key: str) -> None:
        """Note that a request found an item in the device tier; have it stored for others."""
        super().used(key)
        self._publish(key)

    def cancel(self, key: str) -> None:
        """Note that the device tier gave up an item that it allocated in this pass."""
        self._tier.cancel(key)
        if self._shared is not None:
            self._shared.cancel(key)

    def reset(self) -> None:
        """Forget all items, and let go of those held in the shared store."""
        super().reset()
        if self._shared is not None:
            self._shared.reset()

    def forget(self, keys: Iterable[str]) -> None:
        """Forget items, also in the shared store."""
        keys = list(keys)
        super().forget(keys)
        self.forget_stored(keys)

    def give_up(self, keys: Iterable[str]) -> None:
        """Forget what the worker could not read from the shared store, in the worker too."""
        assert self._shared is not None
        self._shared.give_up(keys)

    def forget_stored(self, keys: Iterable[str]) -> None:
        """Remove items from the shared store, whether or not this instance has them too."""
        if self._shared is not None:
            self._shared.forget(keys)

    def figures(self) -> dict[str, float]:
        """As of the host tier, and what came from elsewhere."""
        return {**super().figures(), **{f"transfer_{k}": v for k, v in self._counts.items()}}

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """Plan the load or save of an item for which the device tier has space now."""
        feature = request.mm_features[index]
        key = feature.identifier
        if feature.modality == PROMPT_EMBEDS:
            if self._is_elsewhere(key):
                # vLLM takes it for one that is loaded.
                self.transport.update_state_after_alloc(request, index)
            return
        if key in self._tier:
            super().update_state_after_alloc(request, index)
            self._publish(key)
            return
        elsewhere = self._is_elsewhere(key)
        self._tier.allocated(
            key,
            feature.mm_position.get_num_embeds() * self._sizes.of(feature.modality),
            feature_cost(feature),
            request.request_id,
            index,
            # A transfer of another transport may yet fail, and then there is nothing to keep.
            elsewhere=elsewhere and self._shared is not None,
        )
        if not is_shared(key):
            return
        self.transport.update_state_after_alloc(request, index)
        if not elsewhere:
            self._publish(key)
        if self.is_consumer:
            self._counts["loaded" if elsewhere else "missed"] += 1

    def update_state_after_free(self, request: Request, index: int) -> None:
        """Pass on that an encoder cache entry was released."""
        self.transport.update_state_after_free(request, index)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ECConnectorMetadata:
        """End the scheduling pass, and tell what the worker has to do."""
        own = super().build_connector_meta(scheduler_output)
        return TransportMetadata(own.plan, self.transport.build_connector_meta(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        """Pass on what workers report."""
        self.transport.update_connector_output(connector_output)

    def take_unavailable_requests(self) -> set[str]:
        """Requests whose inputs the transport can no longer get."""
        found: set[str] = self.transport.take_unavailable_requests()
        return found if self._bare is None else found | self._bare.take_unavailable()

    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request; what the transport says goes into its answer."""
        self._expectations.forget(request.request_id)
        if self._bare is not None:
            self._bare.forget(request.request_id)
        delayed, told = self.transport.request_finished(request)
        asked = request.ec_transfer_params
        if self._shared is not None and self.is_consumer:
            # Only a proxy wants to know the names of items, and says so in the request.
            told = told if isinstance(asked, dict) and asked.keys() - {JOB} else None
        return bool(delayed), told and {key: told[key] for key in told if is_shared(key)}

    def has_pending_push_work(self) -> bool:
        """Whether the transport has work left after the last request."""
        return bool(self.transport.has_pending_push_work())

    def shutdown(self) -> None:
        """Shut the transport down."""
        self.transport.shutdown()

    def _publish(self, key: str) -> None:
        if self._shared is not None and self.is_producer and is_shared(key):
            self._shared.publish(key)

    # --- in the worker ----------------------------------------------------------------------------

    def register_caches(self, ec_caches: dict[str, torch.Tensor]) -> None:
        """Pass the worker's encoder cache on."""
        self.transport.register_caches(ec_caches)

    def start_worker_services(self) -> None:
        """Start the transport's services."""
        self.transport.start_worker_services()

    def bind_connector_metadata(self, connector_metadata: ECConnectorMetadata) -> None:
        """Take the plan of a step."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, TransportMetadata)
        self.transport.bind_connector_metadata(connector_metadata.transport)

    def clear_connector_metadata(self) -> None:
        """Drop the plan of a step."""
        super().clear_connector_metadata()
        self.transport.clear_connector_metadata()

    def start_save_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        """Begin a producer's step; the runner loads nothing where it only encodes."""
        if not self.is_consumer:
            self.start_load_caches(encoder_cache)
        if self._shared is None:
            self.transport.start_save_caches(encoder_cache=encoder_cache, **kwargs)

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        """Load what the scheduler planned, from the host and from elsewhere."""
        if self._shared is not None:
            self._store.drop(self._shared.drop_lost(encoder_cache))
        super().start_load_caches(encoder_cache)
        self.transport.start_load_caches(encoder_cache, **kwargs)
        self._device_outputs = encoder_cache
        if self._shared is not None and self.is_producer:
            # What the host had is in the encoder cache only now.
            self._shared.start_save_caches(encoder_cache)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **_: Any) -> None:
        """Let the transport have an item that was just encoded; ``get_finished`` keeps it."""
        if self.is_producer and is_shared(mm_hash):
            self.transport.save_caches(encoder_cache, mm_hash)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Keep what came from elsewhere or was encoded; tell whose transfers have ended."""
        # vLLM's second model runner tells only producers of what was just encoded, and both runners
        # ask for this when it is.
        for key in self._plan().saves:
            if (output := self._device_outputs.get(key)) is not None:
                self._store.save(key, output)
        found: tuple[set[str] | None, set[str] | None] = self.transport.get_finished(
            finished_req_ids
        )
        return found

    def build_connector_worker_meta(self) -> Any:
        """What the transport's worker side reports."""
        return self.transport.build_connector_worker_meta()
