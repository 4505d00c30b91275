"""Model inputs of chats in the API server, before and after the engine has them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from front import Front, chat_route, opened
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from vllm_mm_ext.adapters.serving import sent_inputs
from vllm_mm_ext.request.context import RequestContext, current_request, enter_request
from vllm_mm_ext.testing.media import make_clip


class Engine:
    """vLLM's chat route and ``AsyncLLM.add_request`` without an engine behind them.

    Attributes:
        came: Bytes of model inputs that came to the engine, of each request.
        alive: Of each request, how many of its tensors were there while it was answered.
    """

    def __init__(self, front: Front) -> None:
        config = front.renderer.config
        self.came: list[int] = []
        self.alive: list[int] = []
        self._sent: list[weakref.ref[torch.Tensor]] = []
        self._client = SimpleNamespace(
            vllm_config=config,
            model_config=config.model_config,
            observability_config=config.observability_config,
            renderer=front.renderer,
            input_processor=InputProcessor(config, front.renderer),
            errored=False,
            get_supported_tasks=self._tasks,
            check_admission=lambda *_: None,
            generate=self._generate,
            _run_output_handler=lambda: None,
            _add_request=self._add,
        )
        engine: Any = self._client
        self.chat = chat_route(engine)

    async def _tasks(self) -> tuple[str, ...]:
        return ("generate",)

    async def _add(self, request: Any, *_: Any) -> None:
        tensors = [
            element.data
            for feature in request.mm_features
            if feature.data is not None
            for element in feature.data.values()
            if isinstance(element.data, torch.Tensor)
        ]
        self.came.append(sum(tensor.nbytes for tensor in tensors))
        self._sent = [weakref.ref(tensor) for tensor in tensors]

    async def _generate(
        self, prompt: Any, params: Any, request_id: str, **_: Any
    ) -> AsyncIterator[RequestOutput]:
        await AsyncLLM.add_request(self._client, request_id, prompt, params)  # type: ignore[arg-type]
        gc.collect()
        self.alive.append(sum(ref() is not None for ref in self._sent))
        answer = CompletionOutput(0, "yes", [1], None, None, finish_reason="stop")
        yield RequestOutput(request_id, None, prompt["prompt_token_ids"], None, [answer], True)


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    make_clip(tmp_path / "clip.mp4", width=64, height=48, fps=4, duration=4, seed=1)
    with opened(tmp_path) as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
async def test_an_api_server_keeps_no_model_inputs_of_a_chat_that_the_engine_has(
    front: Front, stream: bool
) -> None:
    sent_inputs.install()
    engine = Engine(front)
    enter_request(RequestContext())
    request = ChatCompletionRequest(model="m", messages=front.messages("clip.mp4"), stream=stream)
    answer: Any = await engine.chat.create_chat_completion(request)
    if stream:
        text = "".join([piece async for piece in answer])
        assert '"content":"yes"' in text
    else:
        assert answer.choices[0].message.content == "yes"
    assert engine.came[0] > 0
    assert engine.alive == [0]


async def test_the_inputs_of_a_beam_search_stay_for_its_next_step() -> None:
    async def handler(*_: Any) -> bool:
        context = current_request()
        return context is not None and context.sends_once

    chat = sent_inputs._noting(handler)
    enter_request(RequestContext())
    for beams in (False, True):
        request = ChatCompletionRequest(model="m", messages=[], use_beam_search=beams)
        assert await chat(None, request) is not beams


async def test_the_prompt_of_a_caller_of_the_engine_stays_as_it_is() -> None:
    async def add_request(*_: Any) -> None:
        pass

    enter_request(RequestContext())
    prompt = {"type": "multimodal", "mm_kwargs": {"video": [object()]}}
    await sent_inputs._letting_go(add_request)(None, "r", prompt)
    assert prompt["mm_kwargs"]["video"] != [None]
