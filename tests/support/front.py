"""vLLM's renderer with the plugin, as an API server has it, and what it makes of requests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.renderers import renderer_from_config
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.usage.usage_lib import UsageContext

from vllm_mm_ext import plugin
from vllm_mm_ext.adapters.serving import answers
from vllm_mm_ext.request import report
from vllm_mm_ext.request.context import RequestContext, enter_request
from vllm_mm_ext.request.trace import RequestTrace
from vllm_mm_ext.testing.checkpoints import checkpoint

CONTEXT = 2048


def chat_route(engine: Any) -> OpenAIServingChat:
    """vLLM's handler of chat completions in front of what stands for an engine."""
    template: dict[str, Any] = {
        "request_logger": None,
        "chat_template": None,
        "chat_template_content_format": "auto",
    }
    return OpenAIServingChat(
        engine,
        OpenAIServingModels(engine, [BaseModelPath("m", "m")]),
        "assistant",
        online_renderer=OnlineRenderer(engine.model_config, engine.renderer, **template),
        **template,
    )


@dataclass(frozen=True)
class Rendered:
    """A rendered request: its prompt, what was recorded on the way, when it came."""

    prompt_tokens: int
    trace: RequestTrace
    arrived: float
    prompt: list[int]

    @property
    def videos(self) -> list[dict[str, Any]]:
        """As reported to the client."""
        found: list[dict[str, Any]] = report.block(self.trace)["videos"]
        return found

    @property
    def video_tokens(self) -> int:
        """All embeddings of videos."""
        return self.trace.tokens["video"]


@dataclass(frozen=True)
class Front:
    """The renderer, and the clips it may read."""

    renderer: Any
    files: Path

    def messages(self, *names: str, text: str = "What is this?") -> list[Any]:
        """One user message with the named clips and a text."""
        parts = [
            {"type": "video_url", "video_url": {"url": (self.files / name).as_uri()}}
            for name in names
        ]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

    def render(
        self,
        *names: str,
        options: dict[str, Any] | None = None,
        session: str | None = None,
        text: str = "What is this?",
        **more: Any,
    ) -> Rendered:
        """A chat request with the named clips; ``more`` are further fields of its body."""
        return self.render_messages(self.messages(*names, text=text), options, session, **more)

    def render_messages(
        self,
        messages: list[Any],
        options: dict[str, Any] | None = None,
        session: str | None = None,
        **more: Any,
    ) -> Rendered:
        """A chat request with these messages."""
        return asyncio.run(self.rendered(messages, options, session, **more))

    async def rendered(
        self,
        messages: list[Any],
        options: dict[str, Any] | None = None,
        session: str | None = None,
        **more: Any,
    ) -> Rendered:
        """As ``render_messages``, for requests at the same time: each is a task of its own."""
        request = ChatCompletionRequest(model="m", messages=messages, **more)
        trace = enter_request(RequestContext()).trace
        answers.begin(options, session, request.kv_transfer_params)
        _, (made,) = await self.renderer.render_chat_async(
            [request.messages],
            request.build_chat_params(None, "auto"),
            request.build_tok_params(self.renderer.model_config),
            prompt_extras={
                "cache_salt": request.cache_salt,
                "mm_processor_kwargs": request.mm_processor_kwargs,
            },
        )
        prompt = list(made["prompt_token_ids"])
        return Rendered(len(prompt), trace, made["arrival_time"], prompt)


@contextmanager
def opened(files: Path, usage: UsageContext | None = None, **arguments: Any) -> Iterator[Front]:
    """A renderer for a tiny Qwen2.5-VL that may read ``files``.

    Args:
        files: A folder.
        usage: What the engine is for.
        arguments: Of the engine.
    """
    plugin.register()
    config = {
        "media": {"sampling": {"fps": 2.0, "max_frames": 64, "min_frames": 2}},
        "reports": {"cache_hits": True},
    }
    args = EngineArgs(
        **{
            "model": str(checkpoint("qwen2_5_vl")),
            "max_model_len": CONTEXT,
            "allowed_local_media_path": str(files),
            "limit_mm_per_prompt": {"video": 3},
            "additional_config": {"mm_ext": config},
            **arguments,
        }
    )
    renderer = renderer_from_config(args.create_engine_config(usage))
    yield Front(renderer, files)
    renderer.shutdown()
