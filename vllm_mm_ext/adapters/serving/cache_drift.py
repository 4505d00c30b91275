"""Answers 503 to requests whose model inputs got lost between vLLM's two processor caches.

vLLM's API server remembers which preprocessed items it has sent, and sends only the hash of an item
that the engine should still hold. The two sides drift apart if the API server remembers an item as
sent although its request never reached the engine (vLLM found the finished prompt too long, or the
client left), or if both evict in a different order. vLLM notices and makes the API server forget
the item, so the same request succeeds when it is sent again. But vLLM's answer to the request does
not say so:

- The engine misses the item: ``LruKeyReplicatedReceiverCache`` raises
  ``MultiModalCacheMissError``, the engine's output has ``mm_cache_miss_hashes`` and the finish
  reason "error", and the route makes ``GenerationError("Internal server error")`` of the reason, a
  500. Only the routes of pooling answer 503.
- The API server forgets an item while another request with the same item is being preprocessed:
  the sender cache's ``get_and_update_item`` fails an assertion, a 500 that quotes the hash.

With this module both answers are a 503. A stream has begun by the time the engine answers, so the
stream ends with an error event of code 503.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError, RetryableRequestError

from vllm_mm_ext.adapters.patches import wrap


class LostInputsError(GracefulHTTPError, RetryableRequestError):  # type: ignore[misc]
    """The engine has lost a request's preprocessed media; the same request, sent again, succeeds.

    ``AsyncLLM.generate`` passes a ``GracefulHTTPError`` on as it is, and streams log no traceback
    for a ``RetryableRequestError``.
    """

    def __init__(self) -> None:
        super().__init__(
            "The engine no longer holds the preprocessed media of this request. Send it again.",
            HTTPStatus.SERVICE_UNAVAILABLE,
        )


def install() -> None:
    """Wrap the two places where vLLM notices that inputs are lost. Idempotent."""
    from vllm.multimodal.processing import BaseMultiModalProcessor
    from vllm.v1.engine.output_processor import OutputProcessor

    wrap(OutputProcessor, "process_outputs", _engine_misses)
    wrap(BaseMultiModalProcessor, "_merge_mm_kwargs", _sender_forgets)


def _engine_misses(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        missed = [out.request_id for out in engine_core_outputs if out.mm_cache_miss_hashes]
        states = [self.request_states.get(request_id) for request_id in missed]
        processed = original(self, engine_core_outputs, *args, **kwargs)
        for state in states:
            # Without a queue there is no event loop (``LLM``). Without a detokenizer the request is
            # a pooling request, which vLLM answers with a 503 itself.
            if state is not None and state.queue is not None and state.detokenizer is not None:
                state.queue.put(LostInputsError())
        return processed

    return process_outputs


def _sender_forgets(original: Callable[..., Any]) -> Callable[..., Any]:
    def _merge_mm_kwargs(
        self: Any,
        cache: Any,
        mm_hashes: Mapping[str, Sequence[str]],
        mm_is_cached: Mapping[str, Sequence[bool]],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        try:
            return original(self, cache, mm_hashes, mm_is_cached, *args, **kwargs)
        except AssertionError as error:
            if all(
                cache.is_cached_item(item)
                for modality, items in mm_hashes.items()
                for item, was_cached in zip(items, mm_is_cached[modality], strict=True)
                if was_cached
            ):
                raise
            raise LostInputsError from error

    return _merge_mm_kwargs
