"""Lets go of a chat's model inputs once the engine has them.

vLLM's chat route keeps the prompt that it has sent until the answer ends, and with it the inputs of
the encoders: for each video megabytes, for as long as the request waits and is answered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_mm_ext.adapters.patches import wrap
from vllm_mm_ext.request.context import RequestContext, current_request, enter_request


def install() -> None:
    """Wrap the chat route and where ``AsyncLLM`` sends a prompt. Idempotent."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.v1.engine.async_llm import AsyncLLM

    wrap(OpenAIServingChat, "create_chat_completion", _noting)
    wrap(AsyncLLM, "add_request", _letting_go)


def _noting(original: Callable[..., Any]) -> Callable[..., Any]:
    async def create_chat_completion(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        context = current_request() or enter_request(RequestContext())
        # Each step of a beam search sends the inputs again.
        context.sends_once = not request.use_beam_search
        return await original(self, request, *args, **kwargs)

    return create_chat_completion


def _letting_go(original: Callable[..., Any]) -> Callable[..., Any]:
    async def add_request(
        self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any
    ) -> Any:
        sent = await original(self, request_id, prompt, *args, **kwargs)
        context = current_request()
        if context is not None and context.sends_once and isinstance(prompt, dict):
            inputs = prompt.get("mm_kwargs")
            if inputs is not None:
                # Another mapping, as what was in the old one may be in a cache as well.
                prompt["mm_kwargs"] = type(inputs)(
                    {modality: [None] * len(items) for modality, items in inputs.items()}
                )
        return sent

    return add_request
