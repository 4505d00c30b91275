"""Greedy answers of the composer: in-process engines and plain PyTorch, as JSON on the last line.

Run by ``test_composer_engine.py`` in a process of its own: ``python composer_engine.py``.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omni_reference import pixels, sound, video
from safetensors.torch import save_file

from vllm_mm_ext.composer.hf_processor import ComposerProcessor
from vllm_mm_ext.composer.reference import ComposerForConditionalGeneration
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.media.payload import Waveform
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.server import KV_CACHE_BYTES

# Computation, and tokens of a step: the last cuts prefill inside segments.
CASES = (("float32", 4096), ("bfloat16", 4096), ("float32", 48))
# Tokens of a segment, 0: videos whole. The first engine serves all, the others the first.
SEGMENTS = (16, 100, 0)
MAX_PATCHES = 40
TOKENS = 6
# Of the LoRA adapter: its rank (vLLM's least) and what it changes.
RANK = 8
TARGETS = ("q_proj.weight", "down_proj.weight")
SIDE = 56
UNEVEN = (0.0, 0.1, 0.2, 1.9, 2.05, 6.5, 6.6, 11.0, 11.25, 12.0)

# What the checkpoint declares.
DEFAULT = Reduction(pool=2, temporal=4)


@dataclass(frozen=True)
class Case:
    """A prompt with its media.

    Attributes:
        prompt: With placeholders.
        frames: Frames of each video.
        times: Their times, of each video.
        tracks: Its sound, of each video.
        audio: Sound by itself.
        reduction: Of all videos.
        shown: Pixels of each video; noise if not given.
    """

    prompt: str
    frames: tuple[int, ...] = ()
    times: tuple[Sequence[float] | None, ...] = (None, None)
    tracks: tuple[Waveform | None, ...] = (None, None)
    audio: tuple[Waveform, ...] = ()
    reduction: Reduction = DEFAULT
    shown: tuple[np.ndarray[Any, Any], ...] = ()

    @property
    def clips(self) -> list[np.ndarray[Any, Any]]:
        if self.shown:
            return list(self.shown)
        return [pixels(count, SIDE, SIDE, seed) for seed, count in enumerate(self.frames)]


SILENT = Case("see <|video_pad|> what", (13,))
SOUNDING = Case("see <|video_pad|> what", (10,), (UNEVEN,), (sound(9.3),))
REDUCTIONS = ((1, 1), (2, 1), (1, 3), (1, 4))  # And (2, 4) in the cases above.
CASES_ASKED: dict[str, Case] = {
    "silent": SILENT,
    "sounding": replace(SOUNDING, times=(tuple(k / 2 for k in range(10)),)),
    "uneven": SOUNDING,
    "audio": Case("hear <|audio_pad|> what", audio=(sound(5.1, 2),)),
    "two": Case(
        "see <|video_pad|> and <|video_pad|> hear <|audio_pad|> what",
        (5, 9),
        (None, UNEVEN[:9]),
        (sound(3.0, 5), None),
        (sound(1.0, 6),),
    ),
    **{
        f"pool {pool} temporal {temporal}": replace(
            SOUNDING, reduction=Reduction(pool=pool, temporal=temporal)
        )
        for pool, temporal in REDUCTIONS
    },
}


def request_of(case: Case) -> dict[str, Any]:
    """As the API server makes it of the request."""
    data: dict[str, Any] = {}
    if case.frames:
        data["video"] = [
            video(clip, times, track, f"{case.reduction.key()}-{index}", case.reduction)
            for index, (clip, times, track) in enumerate(
                zip(case.clips, case.times, case.tracks, strict=False)
            )
        ]
    if case.audio:
        data["audio"] = list(case.audio)
    return {"prompt": case.prompt, "multi_modal_data": data}


def start(dtype: str, chunk: int, path: Path | None = None, **options: Any) -> Any:
    from vllm import LLM

    return LLM(
        str(path or checkpoint("composer")),
        dtype=dtype,
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_model_len=4096,
        max_num_batched_tokens=chunk,
        max_num_seqs=4,
        limit_mm_per_prompt={"video": 2, "audio": 1},
        **options,
    )


def answers(
    engine: Any, requests: Sequence[Any], *, fresh: bool = True, adapter: Any = None
) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    greedy = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=1, ignore_eos=True)
    found = []
    for one in requests:
        if fresh:
            engine.reset_prefix_cache()
            engine.reset_mm_cache()
            engine.llm_engine.engine_core.reset_encoder_cache()
        answer = engine.generate([one], greedy, use_tqdm=False, lora_request=adapter)[0]
        best = [next(iter(step.values())).logprob for step in answer.outputs[0].logprobs or ()]
        found.append(
            {
                "prompt": list(answer.prompt_token_ids),
                "tokens": list(answer.outputs[0].token_ids),
                "logprobs": best,
                "cached": answer.num_cached_tokens,
            }
        )
    return found


def expected(model: Any, processor: ComposerProcessor, case: Case) -> dict[str, Any]:
    """What plain PyTorch answers, and how sure it is of each token."""
    reduction = {"pool": case.reduction.pool, "temporal": case.reduction.temporal}
    inputs = processor(
        case.prompt,
        case.clips,
        case.audio,
        seconds=case.times[: len(case.frames)],
        sounds=case.tracks[: len(case.frames)],
        reduction=reduction,
    )
    dtype = model.dtype
    seen = heard = None
    with torch.inference_mode():
        if case.frames:
            seen = model.video_embeddings(
                inputs["pixel_values"].to(dtype),
                inputs["seconds"].float(),
                inputs["frames_per_item"],
                **reduction,
            )
        if "features" in inputs:
            features = [mel.to(dtype) for mel in inputs["features"]]
            heard = torch.cat(
                model.audio_embeddings(features, inputs["start_seconds"], inputs["lengths"])
            )
        ids = inputs["input_ids"]
        embeds = model.inputs_embeds(ids, seen, heard)
        tokens: list[int] = []
        logprobs: list[float] = []
        for _ in range(TOKENS):
            logits = model(inputs_embeds=embeds).logits[0, -1].float()
            token = int(logits.argmax())
            tokens.append(token)
            logprobs.append(float(logits.log_softmax(-1)[token]))
            embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[token]]))], 1)
    return {"prompt": ids[0].tolist(), "tokens": tokens, "logprobs": logprobs}


def followed_up(engine: Any) -> list[dict[str, Any]]:
    """A video, and a second question about it that finds its KV and encoder outputs."""
    again = replace(SOUNDING, prompt=SOUNDING.prompt + " happens next")
    return answers(engine, [request_of(SOUNDING), request_of(again)], fresh=False)


def watch_encoder(model: Any) -> None:
    """Bound encoder calls, and keep the frames of each call in ``model.calls``."""
    model.encoder_max_patches = MAX_PATCHES
    model.calls = []
    original = model.vision_tower.forward

    def forward(frames: Any) -> Any:
        model.calls.append(len(frames))
        return original(frames)

    model.vision_tower.forward = forward


def run(dtype: str, chunk: int) -> dict[str, Any]:
    """All answers of one engine."""
    engine = start(dtype, chunk)
    requests = [request_of(case) for case in CASES_ASKED.values()]
    found: dict[str, Any] = {}
    first = (dtype, chunk) == CASES[0]
    for tokens in SEGMENTS if first else SEGMENTS[:1]:
        engine.renderer.mm_processor.segment_tokens = tokens
        found[f"segments of {tokens}"] = answers(engine, requests)
    calls: list[int] = []
    if first:
        engine.apply_model(watch_encoder)
        found["bounded"] = answers(engine, requests)
        calls = engine.apply_model(lambda model: model.calls)[0]
    engine.renderer.mm_processor.segment_tokens = SEGMENTS[0]
    engine.reset_prefix_cache()
    follow_up = followed_up(engine)
    core = engine.llm_engine.engine_core.engine_core
    media = core.scheduler.kv_cache_manager.block_pool.media()
    cached: dict[str, int] = {}
    for item in media:
        for name, count in item.modalities.items():
            cached[name] = cached.get(name, 0) + count
    config = engine.renderer.mm_processor.config
    pads = [config.audio_pad_token_id, config.video_pad_token_id]
    del engine, core
    gc.collect()
    return {
        "answers": found,
        "calls": calls,
        "follow_up": follow_up,
        "cached": cached,
        "pads": pads,
    }


def write_adapter(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    """A random LoRA adapter of the text model, as PEFT writes one; what it adds to which weight."""
    random = torch.Generator().manual_seed(7)
    weights, added = {}, {}
    for name, weight in model.named_parameters():
        if not name.startswith("language_model.") or not name.endswith(TARGETS):
            continue
        down = torch.randn(RANK, weight.shape[1], generator=random) / RANK
        up = torch.randn(weight.shape[0], RANK, generator=random) / RANK
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        weights |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        added[name] = up @ down
    save_file(weights, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in added})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


def run_adapted(processor: ComposerProcessor, path: Path) -> dict[str, Any]:
    """A text model with an adapter, and plain PyTorch with it added to the weights."""
    from vllm.lora.request import LoRARequest

    model = ComposerForConditionalGeneration.from_pretrained(path, dtype="float32").eval()
    with tempfile.TemporaryDirectory() as folder:
        added = write_adapter(Path(folder), model)
        engine = start("float32", 4096, enable_lora=True, max_lora_rank=RANK)
        adapter = LoRARequest("adapter", 1, folder)
        (got,) = answers(engine, [request_of(SOUNDING)], adapter=adapter)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight += added.get(name, 0.0)
    return {"got": got, "plain": expected(model, processor, SOUNDING)}


def main() -> None:
    path = checkpoint("composer")
    processor = ComposerProcessor.from_pretrained(path)
    again = replace(SOUNDING, prompt=SOUNDING.prompt + " happens next")
    plain: dict[str, Any] = {}
    for dtype in dict.fromkeys(dtype for dtype, _ in CASES):
        model = ComposerForConditionalGeneration.from_pretrained(path, dtype=dtype).eval()
        plain[dtype] = {
            name: expected(model, processor, case) for name, case in CASES_ASKED.items()
        }
        plain[dtype]["again"] = expected(model, processor, again)
    engines = [run(*case) for case in CASES]
    adapted = run_adapted(processor, path)
    print(json.dumps({"plain": plain, "engines": engines, "adapted": adapted}))


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_PLUGINS"] = "mm_ext"
    main()
