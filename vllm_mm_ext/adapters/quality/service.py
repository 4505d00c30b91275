"""The quality controller and the shared state of the vLLM service that this process belongs to."""

from __future__ import annotations

import logging
import threading
from functools import lru_cache
from typing import Any

from vllm_mm_ext.adapters.vllm_compat import service_of, settings_of
from vllm_mm_ext.base.shared_state import SharedState, join_state, private_state
from vllm_mm_ext.config.quality_settings import QualitySettings
from vllm_mm_ext.policies.quality.controller import QualityController

logger = logging.getLogger("vllm.mm_ext")

_joining = threading.Lock()


def controller_for(vllm_config: Any) -> QualityController:
    """The process's quality controller for a vLLM configuration; cheap after the first call."""
    engines = vllm_config.parallel_config.data_parallel_size
    return _controller(quality_settings(vllm_config), state_for(vllm_config), engines)


@lru_cache(maxsize=8)
def _controller(settings: QualitySettings, state: SharedState, engines: int) -> QualityController:
    return QualityController(settings, state, engines=engines)


def quality_settings(vllm_config: Any) -> QualitySettings:
    """The ``quality`` section that travels with a vLLM configuration; the defaults without one."""
    return settings_of(vllm_config.model_config).quality


def state_for(vllm_config: Any) -> SharedState:
    """What this process shares with the engines and the other API servers of its service.

    Where that cannot be, the state is the process's own, with a warning.
    """
    api_servers = vllm_config.parallel_config._api_process_count
    # A process must join once only.
    with _joining:
        return _state(service_of(vllm_config.model_config), api_servers)


# A process that makes one engine after another leaves the files of the first ones.
@lru_cache(maxsize=8)
def _state(service: str | None, api_servers: int) -> SharedState:
    if service is not None:
        try:
            return join_state(service, api_servers)
        except OSError as error:
            logger.warning("mm_ext: API servers do not share load and quality: %s", error)
    return private_state()
