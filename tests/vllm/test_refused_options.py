"""A request's `mm_ext` on a route that does not honour it is a 400, never passed by in silence."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
from argparse import Namespace
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, UploadFile
from fastapi.routing import APIRoute
from starlette.requests import Request
from vllm.entrypoints.anthropic.protocol import (
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
)
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.generative_scoring.serving import (
    GenerativeScoringRequest,
    ServingGenerativeScoring,
)
from vllm.entrypoints.generate.structured_decisions.protocol import StructuredDecisionRequest
from vllm.entrypoints.generate.structured_decisions.serving import ServingStructuredDecisions
from vllm.entrypoints.launchers.api_server.routers import register_api_routers
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.pooling.classify import api_router as classify
from vllm.entrypoints.pooling.classify.protocol import ClassificationChatRequest
from vllm.entrypoints.pooling.embed import api_router as embed
from vllm.entrypoints.pooling.embed.protocol import CohereEmbedRequest, EmbeddingChatRequest
from vllm.entrypoints.pooling.pooling import api_router as pooling
from vllm.entrypoints.pooling.pooling.protocol import PoolingChatRequest
from vllm.entrypoints.pooling.scoring import api_router as scoring
from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreTextRequest
from vllm.entrypoints.pooling.scoring.serving import ServingScores
from vllm.entrypoints.scale_out.render.serving import ServingRender
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest
from vllm.entrypoints.speech_to_text.transcription.serving import OpenAIServingTranscription
from vllm.entrypoints.speech_to_text.translation.protocol import TranslationRequest
from vllm.entrypoints.speech_to_text.translation.serving import OpenAIServingTranslation
from vllm.exceptions import VLLMValidationError

from vllm_mm_ext.adapters.serving.encoders_apart import answers_questions
from vllm_mm_ext.plugin import register
from vllm_mm_ext.request.context import RequestContext, enter_request

MESSAGES = [{"role": "user", "content": "hi"}]
ROUTES = {
    "/v1/completions": (OpenAIServingCompletion, "create_completion", CompletionRequest),
    "/v1/chat/completions/batch": (
        *(OpenAIServingChatBatch, "create_batch_chat_completion"),
        BatchChatCompletionRequest,
    ),
    "/v1/chat/completions/render": (ServingRender, "render_chat_request", ChatCompletionRequest),
    "/v1/messages/render": (ServingRender, "render_messages_request", AnthropicMessagesRequest),
    "/v1/completions/render": (ServingRender, "render_completion_request", CompletionRequest),
    "/v1/responses/render": (ServingRender, "render_responses_request", ResponsesRequest),
    "/v1/embeddings": (PoolingBaseServing, "__call__", EmbeddingChatRequest),
    "/pooling": (PoolingBaseServing, "__call__", PoolingChatRequest),
    "/classify": (PoolingBaseServing, "__call__", ClassificationChatRequest),
    **dict.fromkeys(("/score", "/v1/score"), (ServingScores, "__call__", ScoreTextRequest)),
    **dict.fromkeys(
        ("/rerank", "/v1/rerank", "/v2/rerank"), (ServingScores, "__call__", RerankRequest)
    ),
    # vLLM's classes for these drop fields that they do not know.
    "/v2/embed": (PoolingBaseServing, "__call__", CohereEmbedRequest),
    "/inference/v1/generate": (ServingTokens, "serve_tokens", GenerateRequest),
    "/v1/systemone": (ServingStructuredDecisions, "create_decision", StructuredDecisionRequest),
    "/v1/messages": (AnthropicServingMessages, "create_messages", AnthropicMessagesRequest),
    "/v1/messages/count_tokens": (
        *(AnthropicServingMessages, "count_tokens"),
        AnthropicCountTokensRequest,
    ),
    "/tokenize": (ServingTokenization, "create_tokenize", TokenizeChatRequest),
    "/generative_scoring": (
        *(ServingGenerativeScoring, "create_generative_scoring"),
        GenerativeScoringRequest,
    ),
    "/v1/audio/transcriptions": (
        *(OpenAIServingTranscription, "create_transcription"),
        TranscriptionRequest,
    ),
    "/v1/audio/translations": (
        *(OpenAIServingTranslation, "create_translation"),
        TranslationRequest,
    ),
}
HONOURED = {"/v1/chat/completions", "/v1/responses"}
# vLLM refuses all fields here that it does not know. From 0.33 on.
FORBIDS = {"/v1/decisions"}
# Takes the requests of other routes and hands them on.
HANDS_ON = {"/invocations"}
# These take no prompt.
WITHOUT_PROMPT = {
    *("/detokenize", "/v1/chat/completions/derender", "/v1/completions/derender"),
    *("/v1/responses/{response_id}/cancel", "/inference/v1/abort_requests", "/ping"),
    *("/scale_elastic_ep", "/is_scaling_elastic_ep"),
}
# These take prompts and answer no questions.
PREPARING = {
    *("/tokenize", "/v1/messages/count_tokens", "/v1/chat/completions/render"),
    *("/v1/messages/render", "/v1/completions/render", "/v1/responses/render"),
}
BODY: dict[str, Any] = {
    "model": "m",
    "messages": MESSAGES,
    "input": "hi",
    "texts": ["hi"],
    "text_1": "a",
    "text_2": "b",
    "query": "a",
    "items": ["b"],
    "label_token_ids": [1],
    "input_type": "query",
    "max_tokens": 1,
    "token_ids": [1],
    "sampling_params": {},
    "state": "",
    "questions": {},
    "mm_ext": {"fps": "x"},
}
OWN_FIELDS: dict[Any, dict[str, Any]] = {
    BatchChatCompletionRequest: {"messages": [MESSAGES]},
    CompletionRequest: {"prompt": "hi"},
    RerankRequest: {"documents": ["b"]},
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
    serving, name, protocol = ROUTES[path]
    if protocol.model_config.get("extra") == "forbid":
        pytest.skip("this vLLM refuses all fields that it does not know")
    body = BODY | OWN_FIELDS.get(protocol, {})
    file = {"file": UploadFile(io.BytesIO())}
    # vLLM's validators change what they are given.
    sent = body | (file if "file" in protocol.model_fields else {})
    request = protocol.model_validate(sent)
    given = {"audio_data": b"", "request": request, "raw_request": received(path, body)}
    method = getattr(serving, name)
    taken = [one for one in inspect.signature(method).parameters if one in given]
    trace = enter_request(RequestContext()).trace
    trace.watched = True

    async def asked() -> None:
        with pytest.raises(VLLMValidationError, match=f"{path} takes no mm_ext"):
            await method(object(), *(given[one] for one in taken or ("request", "raw_request")))
        # A takedown ends the request by the task in which vLLM serves it.
        assert trace.tasks == {asyncio.current_task()}

    asyncio.run(asked())


def routes(*routers: APIRouter) -> set[str]:
    """The routes of a server that generates, and of these routers, to which requests are posted."""
    app = FastAPI()
    args = Namespace(enable_scale_out=True, enable_fault_tolerance=False, tokens_only=False)
    app.state.args = args
    register_api_routers(args, app, ("generate", "transcription"))
    for router in routers:
        app.include_router(router)
    return {
        route.path
        for route in app.routes
        if isinstance(route, APIRoute) and "POST" in (route.methods or ())
    }


def test_there_is_no_other_route() -> None:
    found = routes(pooling.router, classify.router, embed.router, scoring.router)
    assert found >= {"/v1/chat/completions", "/v1/embeddings", "/rerank", "/v1/systemone"}
    assert found - ROUTES.keys() - HONOURED - FORBIDS - HANDS_ON - WITHOUT_PROMPT == set()


def test_an_instance_that_encodes_only_answers_on_no_route() -> None:
    found = routes()
    # It answers requests for encoding on this one.
    asked = found - {"/v1/chat/completions"} - WITHOUT_PROMPT - PREPARING
    assert asked
    assert [path for path in asked if not answers_questions(path)] == []
