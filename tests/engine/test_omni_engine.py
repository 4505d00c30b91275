"""What an omni model says about a video with sound is what it says under transformers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engine_script import run_script
from omni_engine import CLIPS, PROMPTS, TOKENS
from omni_reference import pixels, sound
from safetensors.torch import load_file

from vllm_mm_ext.testing.checkpoints import checkpoint

CLASSES = {
    "qwen2_5_omni": ("Qwen2_5OmniThinkerForConditionalGeneration", "Qwen2_5OmniProcessor"),
    "qwen3_omni": ("Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen3OmniMoeProcessor"),
}


def fuse_experts(state: dict[str, torch.Tensor]) -> None:
    """Stack the experts of a checkpoint as transformers holds them in memory."""
    layers = {m[1] for k in state if (m := re.match(r"(.*\.experts\.)0\.gate_proj", k))}
    for layer in layers:
        names = [k for k in state if k.startswith(layer)]
        count = len(names) // 3

        def take(name: str, layer: str = layer, count: int = count) -> list[torch.Tensor]:
            return [state.pop(f"{layer}{i}.{name}.weight") for i in range(count)]

        pairs = zip(take("gate_proj"), take("up_proj"), strict=True)
        state[f"{layer}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        state[f"{layer}down_proj"] = torch.stack(take("down_proj"))


def transformers_answers(family: str) -> list[dict[str, Any]]:
    path = checkpoint(family)
    model_name, processor_name = CLASSES[family]
    config = transformers.AutoConfig.from_pretrained(path)
    model = getattr(transformers, model_name)(config.thinker_config)
    state: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        state |= {k.removeprefix("thinker."): v for k, v in load_file(file).items()}
    fuse_experts(state)
    model.load_state_dict(state)
    model = model.float().eval()
    processor = getattr(transformers, processor_name).from_pretrained(path)
    answers = []
    for frames, fps, seconds in CLIPS:
        media: dict[str, Any] = {"audio": [np.asarray(sound(seconds))]}
        if frames:
            media |= {"videos": [pixels(frames)], "fps": fps, "do_sample_frames": False}
        inputs = processor(
            text=PROMPTS[family]["video" if frames else "audio"],
            use_audio_in_video=bool(frames),
            return_tensors="pt",
            **media,
        )
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                use_audio_in_video=bool(frames),
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=None,
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        best = [float(logits.log_softmax(-1).max()) for logits in out.logits]
        answers.append({"tokens": tokens, "logprobs": best})
    return answers


@pytest.mark.engine
@pytest.mark.parametrize(
    "family", ["qwen2_5_omni", pytest.param("qwen3_omni", marks=pytest.mark.slow)]
)
def test_answers_about_videos_with_sound_equal_transformers(family):
    """In one batch, with prefill cut into pieces that split a video's tokens anywhere."""
    answers = run_script("omni_engine.py", family, 200, timeout_s=300)
    for answer, expected in zip(answers, transformers_answers(family), strict=True):
        assert answer["tokens"] == expected["tokens"]
        assert answer["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-3)
