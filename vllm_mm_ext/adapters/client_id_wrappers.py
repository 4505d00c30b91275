"""Shortens the ids that clients choose where requests enter vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_mm_ext.adapters.names.names_check import VllmName
from vllm_mm_ext.adapters.patches import wrap
from vllm_mm_ext.adapters.vllm_compat import Feature
from vllm_mm_ext.base.client_ids import MAX_HASH_CHARACTERS, short_id, short_media_ids, too_long

_RENDERER = "vllm.renderers.base:BaseRenderer"
_INPUTS = "vllm.v1.engine.input_processor:InputProcessor"
_TOKENS = "vllm.entrypoints.scale_out.token_in_token_out"


def shorten_client_ids() -> None:
    """Let nothing behind vLLM's front-end see a long id of a client. Idempotent."""
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.engine.input_processor import InputProcessor

    wrap(BaseRenderer, "_process_mm_uuids", _with_short_media_ids)
    wrap(InputProcessor, "process_inputs", _with_short_session_id)
    wrap(ServingTokens, "serve_tokens", _without_long_hashes)


def _with_short_media_ids(original: Callable[..., Any]) -> Callable[..., Any]:
    def _process_mm_uuids(
        self: Any, mm_data: Any, mm_data_items: Any, mm_uuid_items: Any, *args: Any, **kwargs: Any
    ) -> Any:
        short = short_media_ids(mm_uuid_items)
        return original(self, mm_data, mm_data_items, short, *args, **kwargs)

    return _process_mm_uuids


def _with_short_session_id(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, *args: Any, session_id: str | None = None, **kwargs: Any) -> Any:
        short = None if session_id is None else short_id(session_id, "session")
        return original(self, *args, session_id=short, **kwargs)

    return process_inputs


def _without_long_hashes(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm.exceptions import VLLMValidationError

    async def serve_tokens(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        length = too_long(request.features.mm_hashes) if request.features else None
        if length is not None:
            raise VLLMValidationError(
                f"features.mm_hashes: a hash has {length} characters; at most "
                f"{MAX_HASH_CHARACTERS} are allowed",
                parameter="features.mm_hashes",
            )
        return await original(self, request, *args, **kwargs)

    return serve_tokens


CLIENT_ID_FEATURE = Feature(
    "client ids",
    "ids of media and sessions are kept as long as clients send them",
    (
        VllmName(
            f"{_RENDERER}._process_mm_uuids",
            ("mm_data", "mm_data_items", "mm_uuid_items"),
            passed_on=True,
        ),
        VllmName(f"{_INPUTS}.process_inputs", ("session_id",), passed_on=True),
        VllmName(f"{_TOKENS}.serving:ServingTokens.serve_tokens", ("request",)),
        VllmName(f"{_TOKENS}.protocol:MultiModalFeatures", ("mm_hashes",), passed_on=True),
        VllmName(f"{_TOKENS}.protocol:GenerateRequest", ("features",), passed_on=True),
    ),
    shorten_client_ids,
)
