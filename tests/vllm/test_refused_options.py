"""A request's `mm_ext` on a route that does not honour it is a 400, never passed by in silence."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import Request
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.structured_decisions.protocol import StructuredDecisionRequest
from vllm.entrypoints.generate.structured_decisions.serving import ServingStructuredDecisions
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.pooling.embed.protocol import CohereEmbedRequest, EmbeddingChatRequest
from vllm.entrypoints.pooling.pooling.protocol import PoolingChatRequest
from vllm.entrypoints.pooling.scoring.protocol import ScoreTextRequest
from vllm.entrypoints.pooling.scoring.serving import ServingScores
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.exceptions import VLLMValidationError

from vllm_mm_ext.plugin import register
from vllm_mm_ext.request.context import RequestContext, enter_request

MESSAGES = [{"role": "user", "content": "hi"}]
ROUTES = {
    "/v1/embeddings": (PoolingBaseServing, "__call__", EmbeddingChatRequest),
    "/pooling": (PoolingBaseServing, "__call__", PoolingChatRequest),
    "/score": (ServingScores, "__call__", ScoreTextRequest),
    # vLLM's classes for these drop fields that they do not know.
    "/v2/embed": (PoolingBaseServing, "__call__", CohereEmbedRequest),
    "/inference/v1/generate": (ServingTokens, "serve_tokens", GenerateRequest),
    "/v1/systemone": (ServingStructuredDecisions, "create_decision", StructuredDecisionRequest),
    "/v1/messages": (AnthropicServingMessages, "create_messages", AnthropicMessagesRequest),
}


def received(path: str, body: dict[str, Any]) -> Request:
    """The request as FastAPI hands it on."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode()}

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    return Request({**scope, "server": ("localhost", 80), "scheme": "http"}, receive)


@pytest.mark.parametrize("path", ROUTES)
def test_a_block_is_refused_where_it_is_not_honoured(path: str) -> None:
    register()
    serving, method, protocol = ROUTES[path]
    body = {
        "model": "m",
        "messages": MESSAGES,
        "texts": ["hi"],
        "text_1": "a",
        "text_2": "b",
        "input_type": "query",
        "max_tokens": 1,
        "token_ids": [1],
        "sampling_params": {},
        "state": "",
        "questions": {},
        "mm_ext": {"fps": "x"},
    }
    if protocol.model_config.get("extra") == "forbid":
        pytest.skip("this vLLM refuses all fields that it does not know")
    request = protocol.model_validate(body)
    trace = enter_request(RequestContext()).trace
    trace.watched = True

    async def asked() -> None:
        with pytest.raises(VLLMValidationError, match=f"{path} takes no mm_ext"):
            await getattr(serving, method)(object(), request, received(path, body))
        # A takedown ends the request by the task in which vLLM serves it.
        assert trace.tasks == {asyncio.current_task()}

    asyncio.run(asked())
