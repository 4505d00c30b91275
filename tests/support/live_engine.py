"""Live sessions on an engine: units as they come, and the same conversation sent at once.

Run by ``test_live_engine`` in a process of its own with a model for each family; prints JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from live_talk import conversation, kinds_of, stretch_units
from PIL import Image
from vllm import AsyncEngineArgs
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_mm_ext.adapters.live.engine import LiveEngine, UnknownModelError
from vllm_mm_ext.live.effects import Append, Respond, ResponseOptions, TurnEnd, Usage
from vllm_mm_ext.live.prompt import Generated, Message, Part, Picture, Prompt, Text, Unit
from vllm_mm_ext.testing.server import KV_CACHE_BYTES

BLOCK = 32


def start(model: Path) -> Any:
    """An engine in a process of its own."""
    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=4096,
            max_num_seqs=4,
            block_size=BLOCK,
            kv_cache_memory_bytes=KV_CACHE_BYTES,
            limit_mm_per_prompt={"video": 2, "audio": 2},
        )
    )


async def live_engine(engine: Any) -> LiveEngine:
    """What live sessions need, without a server around the engine."""
    models = OpenAIServingModels(engine, [BaseModelPath(name="tiny", model_path="tiny")])
    chat = SimpleNamespace(
        chat_template=None,
        chat_template_content_format="auto",
        default_chat_template_kwargs={},
        default_sampling_params=engine.model_config.get_diff_sampling_param(),
        override_max_tokens=None,
    )
    return await LiveEngine.start(
        engine, SimpleNamespace(openai_serving_chat=chat, openai_serving_models=models)
    )


class Heard:
    """A listener that lets a caller wait for what it is told."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()

    def appended(self, tokens: int | None, computed: int, turn_end: TurnEnd | None) -> None:
        self.told.put_nowait(("appended", tokens, computed, turn_end))

    def wrote(self, response_id: str, token_ids: tuple[int, ...], text: str, usage: Usage) -> None:
        self.told.put_nowait(("wrote", response_id, token_ids, text, usage))

    def ended(self, response_id: str, reason: str, usage: Usage) -> None:
        self.told.put_nowait(("ended", response_id, reason, usage))

    def failed(self, response_id: str | None, error_type: str, code: str, message: str) -> None:
        self.told.put_nowait(("failed", response_id, error_type, code, message))

    async def answer(self) -> tuple[tuple[int, ...], tuple[Any, ...]]:
        """Tokens of an answer, and what was told at its end."""
        ids: tuple[int, ...] = ()
        while True:
            told = await asyncio.wait_for(self.told.get(), 60)
            if told[0] == "wrote":
                ids += told[2]
            else:
                return ids, told


async def one_turn(
    session: Any, heard: Heard, history: list[Message], units: list[Unit], name: str, *more: Part
) -> tuple[list[tuple[int, int]], Prompt, tuple[int, ...], Usage]:
    """Append a turn's units one by one, then ask."""
    counts = []
    for count in range(1, len(units)):
        session.append(Append(conversation(history, units[:count], name, open=True)))
        told = await asyncio.wait_for(heard.told.get(), 60)
        assert told[0] == "appended", told
        counts.append(told[1:3])
    asked = conversation(history, units, name, *more, open=False)
    session.respond(Respond(name, asked, ResponseOptions(16, 0.0)))
    ids, end = await heard.answer()
    assert end[0] == "ended", end
    return counts, asked, ids, end[3]


async def ask(live: LiveEngine, prompt: Prompt, name: str) -> tuple[tuple[int, ...], Usage]:
    """The answer of a session that is asked a whole conversation at once."""
    heard = Heard()
    session = await live.open(name, heard)
    session.respond(Respond(name, prompt, ResponseOptions(16, 0.0)))
    ids, end = await heard.answer()
    await session.close()
    assert end[0] == "ended", end
    return ids, end[3]


async def chance_of_an_end(session: Any, heard: Heard, prompt: Prompt) -> Any:
    """What the model says of whether the turn has ended."""
    session.append(Append(prompt, pause=1))
    told = await asyncio.wait_for(heard.told.get(), 60)
    turn_end = told[3]
    return None if turn_end is None else turn_end.chance


async def stopped(session: Any, heard: Heard, asked: tuple[Prompt, tuple[int, ...]]) -> list[Any]:
    """What is told of answers that are stopped early and late, and whether the next one is right.

    The next one's name comes last, if it alone is told.
    """
    prompt, ids = asked
    for wait_s in (0.0, 0.05, 0.5):
        name = f"stopped after {wait_s}"
        session.respond(Respond(name, prompt, ResponseOptions(400, 0.0)))
        await asyncio.sleep(wait_s)
        session.abort(name)
    while not heard.told.empty():
        heard.told.get_nowait()
    session.respond(Respond("next", prompt, ResponseOptions(16, 0.0)))
    again, end = await heard.answer()
    return [again == ids, end[0], end[1]]


async def refused(live: LiveEngine) -> dict[str, Any]:
    """What is told of prompts that cannot be, and that the session goes on."""
    heard = Heard()
    session = await live.open("refused", heard)
    long = Prompt((Message("user", (Text("word " * 6000),)),), open=False)
    found: dict[str, Any] = {}
    for name, prompt in (("long", long), ("empty", Prompt((), open=False))):
        session.respond(Respond(name, prompt, ResponseOptions(4, 0.0)))
        found[name] = (await heard.answer())[1]
    session.append(Append(long))
    found["append"] = await asyncio.wait_for(heard.told.get(), 60)
    short = Prompt((Message("user", (Text("Hello"),)),), open=False)
    session.respond(Respond("short", short, ResponseOptions(4, 0.0)))
    found["short"] = (await heard.answer())[1][0]
    await session.close()
    try:
        await live.open("other", heard, model="unknown")
    except UnknownModelError as error:
        found["unknown"] = str(error)
    return found


async def family(model: Path) -> dict[str, Any]:
    """What a family's sessions do."""
    engine = start(model)
    try:
        live = await live_engine(engine)
        traits = live.traits
        heard = Heard()
        session = await live.open("talk", heard)
        history = [Message("system", (Text("You are a helpful assistant."),))]
        found: dict[str, Any] = {"unit_s": traits.unit_s, "turns": []}
        asked = []
        for number, (sound, frames) in enumerate(kinds_of(traits)):
            name = f"turn{number}"
            units = stretch_units(traits, sound=sound, frames=frames)
            more: list[Part] = [Text("What happens in this video? Describe <|video_pad|> it.")]
            if traits.images and number == 1:
                rng = np.random.default_rng(9)
                pixels = rng.integers(0, 256, (56, 84, 3), dtype=np.uint8)
                more.append(Picture(Image.fromarray(pixels), "nine"))
            counts, prompt, ids, usage = await one_turn(session, heard, history, units, name, *more)
            history = [*prompt.messages, Message("assistant", (Generated(ids, ""),))]
            asked.append((prompt, ids))
            measured = sum(live.measure(message) for message in prompt.messages)
            found["turns"].append(
                {
                    "kind": f"sound={sound} frames={frames}",
                    "appends": counts,
                    "usage": [
                        usage.input_tokens,
                        usage.cached_tokens,
                        usage.output_tokens,
                        usage.audio_tokens,
                        usage.image_tokens,
                    ],
                    "measured": measured,
                }
            )
        found["turn_end"] = await chance_of_an_end(session, heard, asked[0][0])
        found["stopped"] = await stopped(session, heard, asked[0])
        await session.close()
        found["refused"] = await refused(live)
        exact = []
        for number, (prompt, ids) in enumerate(asked):
            await engine.reset_prefix_cache()
            await engine.reset_mm_cache()
            await engine.reset_encoder_cache()
            again, usage = await ask(live, prompt, f"again{number}")
            exact.append([again == ids, usage.cached_tokens, list(ids), list(again)])
        found["exact"] = exact
        return found
    finally:
        engine.shutdown()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(family(Path(sys.argv[1])))))
