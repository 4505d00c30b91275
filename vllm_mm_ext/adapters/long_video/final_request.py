"""Checks the request that is answered in the end, before anything is done for it."""

from __future__ import annotations

import asyncio
from typing import Any

from vllm_mm_ext.request.context import RequestContext, enter_request


async def final_request_tokens(serving: Any, request: Any) -> Any:
    """Tokens of the prompt of a request, without sending it to the engine.

    Args:
        serving: vLLM's handler of chat completions.
        request: The client's request without its videos.

    Returns:
        The number, images and sound included; vLLM's ``ErrorResponse`` where vLLM refuses it.

    Raises:
        VLLMError: As vLLM raises it.
    """
    # In a task of its own: what is noted about this rendering is not what the client gets.
    return await asyncio.create_task(_rendered_tokens(serving, request))


async def _rendered_tokens(serving: Any, request: Any) -> Any:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    enter_request(RequestContext())
    # The processor cache is left out, as it takes what it holds for sent to the engine.
    rendered = await serving.online_renderer.render_chat(request, skip_mm_cache=True)
    if isinstance(rendered, ErrorResponse):
        return rendered
    tokens = request.max_completion_tokens or request.max_tokens
    defaults = serving.default_sampling_params
    most = tokens or serving.model_config.max_model_len
    if request.use_beam_search:
        request.to_beam_search_params(most, defaults)
    else:
        config = serving.engine_client.vllm_config
        request.to_sampling_params(most, defaults).verify(
            serving.model_config,
            config.speculative_config,
            config.structured_outputs_config,
            serving.renderer.tokenizer,
        )
    _, (prompt,) = rendered
    return serving._extract_prompt_len(prompt)
