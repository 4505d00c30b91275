"""An engine started by a written plan in this process: what it makes of the planned requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_mm_ext.planner.workload import Workload
from vllm_mm_ext.testing.media import Tone, make_audio, make_clip


@dataclass
class Recorded:
    """What an engine did.

    Attributes:
        blocks: KV blocks of each request at its end, by request id.
        running: Requests that ran in each step.
        waiting: Requests that waited after each step.
        preempted: Requests that were preempted, in all.
    """

    blocks: dict[str, int] = field(default_factory=dict)
    running: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    preempted: int = 0


@dataclass(frozen=True)
class Served:
    """One request as the engine served it.

    Attributes:
        prompt: Prompt tokens.
        blocks: KV blocks at its end.
        items: Embeddings of each of its mm items, by modality, in the order of the prompt.
    """

    prompt: int
    blocks: int
    items: dict[str, list[int]]


def start_planned(config: Path, media: Path) -> Any:
    """A ``vllm.LLM`` in this process with the settings of a ``--config`` file.

    Args:
        config: The file.
        media: Directory of the media that requests name.
    """
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # The module has moved between vLLM 0.32 and 0.33.
    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ModuleNotFoundError:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    parser = make_arg_parser(FlexibleArgumentParser())
    arguments = EngineArgs.from_cli_args(parser.parse_args(["--config", str(config)]))
    arguments.allowed_local_media_path = str(media)
    return LLM.from_engine_args(arguments)


def serve_all(
    llm: Any, conversations: Sequence[Sequence[dict[str, Any]]], output: int
) -> tuple[list[Served], Recorded]:
    """Ask all conversations at once, each for so many tokens.

    Args:
        llm: As ``start_planned`` returns it.
        conversations: OpenAI messages of each.
        output: Tokens of an answer.
    """
    from vllm import SamplingParams

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    recorded = Recorded()
    features: dict[str, Any] = {}
    schedule, free = scheduler.schedule, scheduler._free_request

    def recording(*args: Any, **kwargs: Any) -> Any:
        made = schedule(*args, **kwargs)
        recorded.running.append(len(scheduler.running))
        recorded.waiting.append(len(scheduler.waiting))
        recorded.preempted += len(made.preempted_req_ids or ())
        return made

    def freeing(request: Any, *args: Any, **kwargs: Any) -> Any:
        ids = scheduler.kv_cache_manager.get_block_ids(request.request_id)
        recorded.blocks[request.request_id] = len(ids[0])
        features[request.request_id] = list(request.mm_features)
        return free(request, *args, **kwargs)

    scheduler.schedule, scheduler._free_request = recording, freeing
    greedy = SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)
    try:
        answers = llm.chat(list(conversations), greedy, use_tqdm=False)
    finally:
        del scheduler.schedule, scheduler._free_request
    return [_served(answer, recorded, features) for answer in answers], recorded


def _served(answer: Any, recorded: Recorded, features: dict[str, Any]) -> Served:
    # The engine gives each request an id of its own that begins with the one it was given.
    name = next(key for key in recorded.blocks if key.split("-")[0] == answer.request_id)
    items: dict[str, list[int]] = {}
    for feature in features[name]:
        items.setdefault(feature.modality, []).append(feature.mm_position.get_num_embeds())
    return Served(len(answer.prompt_token_ids), recorded.blocks[name], items)


def messages(workload: Workload, media: Path, question: str, seed: int) -> list[dict[str, Any]]:
    """A request of a workload, with media of its own.

    Args:
        workload: What the request holds.
        media: Directory into which its files are written.
        question: Its text, of as many tokens as the workload says.
        seed: Makes its media unlike those of others.
    """
    parts: list[dict[str, Any]] = []
    for index, video in enumerate(workload.videos):
        path = media / f"{seed}-{index}.mp4"
        tones = [Tone(300 + 10 * seed, 0, video.seconds)] if video.sound else None
        make_clip(
            path,
            width=video.width,
            height=video.height,
            fps=video.source_fps,
            duration=video.seconds,
            audio=tones,
            seed=seed + 1000 * index,
        )
        parts.append({"type": "video_url", "video_url": {"url": path.as_uri()}})
    for index, seconds in enumerate(workload.audios):
        path = media / f"{seed}-{index}.wav"
        make_audio(path, tones=[Tone(500 + 7 * seed, 0, seconds)], duration=seconds)
        parts.append({"type": "audio_url", "audio_url": {"url": path.as_uri()}})
    for index, image in enumerate(workload.images):
        path = media / f"{seed}-{index}.png"
        _write_image(path, image.width, image.height, seed + 1000 * index)
        parts.append({"type": "image_url", "image_url": {"url": path.as_uri()}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def _write_image(path: Path, width: int, height: int, seed: int) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height)).save(path)
