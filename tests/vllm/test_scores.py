"""``/score`` and ``/rerank`` about media: nothing waits for them, and no text stands for one.

A bi-encoder makes an embedding of the query and of each document; a cross-encoder reads each
document together with the query.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from front import Front, opened
from vllm import PoolingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.pooling.base.io_processor import PoolingIOProcessor
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.pooling.scoring.io_processor import (
    BiEncoderIOProcessor,
    CrossEncoderIOProcessor,
    LateInteractionIOProcessor,
)
from vllm.entrypoints.pooling.scoring.protocol import RerankRequest
from vllm.entrypoints.pooling.typing import PoolingServeContext
from vllm.exceptions import VLLMValidationError
from vllm.model_executor import model_loader
from vllm.renderers.chat_utils import ChatTemplateConfig

from vllm_mm_ext.adapters.placeholder_counts import check_places
from vllm_mm_ext.adapters.runtime import runtime_of
from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.request.context import RequestContext, enter_request
from vllm_mm_ext.testing.media import make_clip
from vllm_mm_ext.testing.origin import Origin, Resource

KINDS = [BiEncoderIOProcessor, LateInteractionIOProcessor, CrossEncoderIOProcessor]
PLACE = "<|video_pad|>"


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    files = tmp_path_factory.mktemp("front")
    for seed, name in enumerate(("a.mp4", "b.mp4")):
        make_clip(files / name, width=64, height=48, duration=2, seed=seed)
    settings = {"mm_ext": {"sight": {"page": True}, "media": {"cache": {"in_flight_mb": 16}}}}
    with opened(files, runner="pooling", additional_config=settings) as made:
        yield made


def clip(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


async def compared(
    front: Front, kind: type[Any], query: Any, *documents: Any, **more: Any
) -> list[Any]:
    """vLLM's prompts of a request for scores, made as its server makes them."""
    enter_request(RequestContext())
    parts = [one if isinstance(one, str) else {"content": one} for one in (query, *documents)]
    request = RerankRequest(model="m", query=parts[0], documents=parts[1:], **more)
    context = PoolingServeContext(
        request=request,
        model_name="m",
        request_id="r",
        pooling_params=PoolingParams(),
        lora_request=None,
        priorities=0,
        prompt_extras={},
    )
    processor = kind(front.renderer.config, front.renderer, ChatTemplateConfig())
    await PoolingBaseServing._preprocessing(None, processor, context)  # type: ignore[arg-type]
    assert context.engine_inputs is not None
    return [made["prompts"] for made in context.engine_inputs]


async def embedded(front: Front, *names: str) -> Any:
    """vLLM's prompt of a conversation that is embedded."""
    enter_request(RequestContext())
    request = ChatCompletionRequest(model="m", messages=front.messages(*names))
    params = {
        "conversations": request.messages,
        "chat_params": request.build_chat_params(None, "auto"),
        "tok_params": request.build_tok_params(front.renderer.model_config),
        **dict.fromkeys(("prompt_extras", "params", "lora_requests", "priorities")),
        "skip_mm_cache": False,
    }
    processor = PoolingIOProcessor(front.renderer.config, front.renderer, ChatTemplateConfig())
    return await processor.render_async(params)


def video_tokens(front: Front, prompt: Any) -> int:
    token = front.renderer.mm_processor.info.get_hf_config().video_token_id
    return list(prompt["prompt_token_ids"]).count(token)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_event_loop_goes_on_while_an_origin_is_slow(
    front: Front, kind: type[Any]
) -> None:
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.01)
            longest = max(longest, time.perf_counter() - before)

    ticking = asyncio.create_task(tick())
    with Origin() as origin:
        body = (front.files / "a.mp4").read_bytes()
        url = origin.serve(f"/{kind.name}.mp4", Resource(body, delay_s=2))
        prompts = await asyncio.create_task(compared(front, kind, "a query", [clip(url)]))
    ticking.cancel()
    assert video_tokens(front, prompts[-1]) > 0
    assert longest < 1


@pytest.mark.parametrize("kind", [*KINDS, PoolingIOProcessor])
async def test_a_request_that_waits_for_room_for_its_media_keeps_no_other_waiting(
    front: Front, kind: type[Any]
) -> None:
    name = f"{kind.__name__}.mp4"
    make_clip(front.files / name, width=64, height=48, duration=2, seed=len(name))
    budget = runtime_of(front.renderer).budget
    claim = budget.claim()
    held = await claim.acquire(budget.max_bytes)
    if kind is PoolingIOProcessor:
        waiting: asyncio.Task[Any] = asyncio.create_task(embedded(front, name))
    else:
        document = [clip((front.files / name).as_uri())]
        waiting = asyncio.create_task(compared(front, kind, "a query", document))
    try:
        while not budget.stats()["waiting"]:
            assert not waiting.done()
            await asyncio.sleep(0.01)
        async with asyncio.timeout(5):
            assert await asyncio.create_task(
                compared(front, CrossEncoderIOProcessor, "a query", "a document")
            )
        assert not waiting.done()
    finally:
        held.release()
        claim.end()
    assert await waiting


@pytest.mark.parametrize("kind", KINDS)
async def test_what_became_of_one_document_did_not_become_of_another(
    front: Front, kind: type[Any]
) -> None:
    runtime = runtime_of(front.renderer)
    urls = [(front.files / name).as_uri() for name in ("a.mp4", "b.mp4")]
    prompts = await compared(front, kind, "a query", *([clip(url)] for url in urls))
    made = [set(prompt["mm_hashes"]["video"]) for prompt in prompts[-2:]]
    assert runtime.seen is not None
    known = [runtime.seen.medium_of(next(iter(hashes)), "video") for hashes in made]
    assert [medium and list(medium.urls)[-1] for medium in known] == urls


@pytest.mark.parametrize("kind", KINDS)
async def test_prompts_of_scores_are_those_of_stock_vllm(front: Front, kind: type[Any]) -> None:
    url = (front.files / "a.mp4").as_uri()
    query, document = [text("red "), clip(url)], [text("a"), text("b")]
    prompts = await compared(front, kind, query, document, "c")
    processor = kind(front.renderer.config, front.renderer, ChatTemplateConfig())
    whole = [front.renderer.get_tokenizer().decode(one["prompt_token_ids"]) for one in prompts]
    assert all(one.replace(PLACE, "").strip() for one in whole)
    if kind is CrossEncoderIOProcessor:
        expected = [
            processor.get_score_prompt(query, other, {"add_special_tokens": True})[0]
            for other in (document, "c")
        ]
    else:
        expected = [f"<|vision_start|>{PLACE}<|vision_end|>red ", "a\nb", "c"]
    assert [squeezed(one) for one in whole] == expected


def squeezed(prompt: str) -> str:
    """A prompt with one placeholder for each video."""
    return prompt.replace(PLACE * prompt.count(PLACE), PLACE) if PLACE in prompt else prompt


@pytest.mark.parametrize("kind", KINDS)
async def test_a_text_that_reads_like_a_place_beside_media_is_refused(
    front: Front, kind: type[Any]
) -> None:
    url = (front.files / "a.mp4").as_uri()
    with pytest.raises(VLLMValidationError, match="reads like the place of one") as caught:
        await compared(front, kind, "a query", [text(PLACE), clip(url)])
    assert caught.value.parameter == "text"


@pytest.mark.parametrize(
    ("query", "document"), [("a" + PLACE, "b"), ("a<|video", "_pad|>b"), ("a", PLACE)]
)
async def test_neither_does_a_document_make_a_place_with_its_query(
    front: Front, query: str, document: str
) -> None:
    url = (front.files / "a.mp4").as_uri()
    with pytest.raises(VLLMValidationError, match="reads like the place of one"):
        await compared(front, CrossEncoderIOProcessor, [text(query), clip(url)], document)
    # Without media it is a text like any other.
    assert await compared(front, CrossEncoderIOProcessor, query, document)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_limit_that_cuts_off_the_place_of_a_video_is_refused(
    front: Front, kind: type[Any], side: str | None
) -> None:
    url = (front.files / "a.mp4").as_uri()
    with pytest.raises(VLLMValidationError) as caught:
        await compared(
            *(front, kind, "a query", [clip(url)]), truncate_prompt_tokens=1, truncation_side=side
        )
    assert caught.value.parameter == "truncate_prompt_tokens"


async def test_so_is_one_for_documents_alone(front: Front) -> None:
    url = (front.files / "a.mp4").as_uri()
    with pytest.raises(VLLMValidationError) as caught:
        await compared(
            *(front, CrossEncoderIOProcessor, "a query", [clip(url)]), max_tokens_per_doc=1
        )
    assert caught.value.parameter == "max_tokens_per_doc"


class _Numbered:
    """A model that numbers its places, as Phi-3-V and Phi-4-multimodal do."""

    @classmethod
    def get_placeholder_str(cls, modality: str, number: int) -> str:
        return f"<|{modality}_{number}|>"


@pytest.mark.parametrize(
    ("words", "parameter"),
    [
        ("a <|image_1|> b <|image_2|>", None),
        ("a <|image_1|> b", "max_tokens_per_doc"),
        ("a <|image_1|> b <|image_2|> <|image_1|>", "text"),
        ("a <|image_1|> b <|image_1|>", "text"),
    ],
)
def test_places_that_a_model_numbers_are_counted_one_by_one(
    front: Front, monkeypatch: pytest.MonkeyPatch, words: str, parameter: str | None
) -> None:
    monkeypatch.setattr(model_loader, "get_model_cls", lambda _: _Numbered)
    expected = nullcontext() if parameter is None else pytest.raises(MediaError)
    with expected as caught:
        check_places(front.renderer, words, {"image": [None, None]}, "max_tokens_per_doc")
    if caught is not None:
        assert caught.value.parameter == parameter
