"""First stage of training: the encoders learn to name what single frames and moments hold.

A text model that starts from nothing learns to ask its media only once the media tell something
apart. The heads of this stage are thrown away; serving weights start from the towers it leaves.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from vllm_mm_ext.composer.configuration import SAMPLE_RATE, STATES_PER_SECOND, ComposerConfig
from vllm_mm_ext.composer.features import mel_windows, pixel_values
from vllm_mm_ext.composer.reference import ComposerForConditionalGeneration, audio_states
from vllm_mm_ext.composer.training.augment import augmented_frames, augmented_sound
from vllm_mm_ext.composer.training.clips import COLOURS, GLIDES, PITCHES, SHAPES, Clip, draw_clip
from vllm_mm_ext.composer.training.muon import Muon
from vllm_mm_ext.composer.training.perception import sound_label
from vllm_mm_ext.composer.training.render import position, render_frames, render_sound
from vllm_mm_ext.composer.training.things import UNKNOWN

# Clips of a step, frames of each, and clips whose sound is heard.
_CLIPS, _FRAMES, _SOUNDS, _SOUND_S = 24, 4, 4, 10
_LR, _WARMUP, _DECAY = 2e-3, 20, 0.3
_COLOURS = list(COLOURS)

Report = Callable[[int, dict[str, float]], None]


class TowerHeads(nn.Module):  # type: ignore[misc]
    """Classifiers over a frame's mean patch and over a token's mean encoder frame.

    Args:
        config: Of the model.
    """

    def __init__(self, config: ComposerConfig) -> None:
        super().__init__()
        vision = int(config.vision_config.hidden_size)
        self.frame = nn.Linear(vision, len(SHAPES) + 2 * len(_COLOURS) + 1 + 2)
        if config.hears:
            audio = int(config.audio_config.d_model)
            self.sound = nn.Linear(audio, 2 + len(PITCHES) + len(GLIDES))


def train_towers(
    model: ComposerForConditionalGeneration, steps: int, seed: int, report: Report
) -> None:
    """Train the towers of a model in place.

    Args:
        model: On any device. Without an audio tower, the vision tower is trained alone.
        steps: How long.
        seed: Decides heads and clips.
        report: Called after each step with its number and the shares of right answers.
    """
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    heads = TowerHeads(model.config).to(device)
    towers = [model.vision_tower, *([model.audio_tower] if model.config.hears else [])]
    parts = nn.ModuleList([*towers, heads]).train()
    hidden = [m.weight for m in parts[:-1].modules() if isinstance(m, nn.Linear)]
    known = {id(weight) for weight in hidden}
    others = [p for p in parts.parameters() if p.requires_grad and id(p) not in known]
    optimizers = [Muon(hidden, lr=_LR), torch.optim.AdamW(others, lr=_LR, fused=True)]
    for step in range(steps):
        rate = _LR * min(1, (step + 1) / _WARMUP, (steps - step) / (_DECAY * steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss, shares = tower_loss(model, heads, seed, step)
        parts.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        report(step, shares)


def tower_loss(
    model: ComposerForConditionalGeneration, heads: TowerHeads, seed: int, step: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of one step and the share of right answers of each head.

    Args:
        model: Only its towers are used.
        heads: Classifiers.
        seed, step: Decide the clips.
    """
    rng = np.random.default_rng((seed, 1, step))
    first = (seed * 1_000_003 + step) * _CLIPS
    clips = [draw_clip(first + i, int(rng.integers(4, 16))) for i in range(_CLIPS)]
    frame_loss, shares = _frame_loss(model, heads, clips, rng)
    if not model.config.hears:
        return frame_loss, shares
    sounds = [draw_clip(first + i, _SOUND_S) for i in range(_SOUNDS)]
    sound_loss, more = _sound_loss(model, heads, sounds, rng)
    return frame_loss + sound_loss, shares | more


def _frame_loss(
    model: ComposerForConditionalGeneration,
    heads: TowerHeads,
    clips: list[Clip],
    rng: np.random.Generator,
) -> tuple[torch.Tensor, dict[str, float]]:
    size = int(model.config.vision_config.image_size)
    pictures, labels, places = [], [], []
    for clip in clips:
        seconds = rng.uniform(0, clip.duration, _FRAMES)
        for index, flash in enumerate(clip.flashes[: _FRAMES // 2]):
            seconds[index] = (flash.start + flash.end) / 2
        pictures.append(augmented_frames(render_frames(clip, seconds.tolist(), size), rng))
        for second in seconds:
            scene, flash_on = clip.scene_at(second), clip.flash_at(second)
            flash_label = _COLOURS.index(flash_on.colour) if flash_on else len(_COLOURS)
            labels.append((SHAPES.index(scene.shape), _COLOURS.index(scene.colour), flash_label))
            places.append(position(scene, second))
    device = next(model.parameters()).device
    pixels = pixel_values(np.concatenate(pictures)).to(device)
    states = model.vision_tower(pixels).last_hidden_state
    out = heads.frame(states.mean(dim=1))
    sizes = (len(SHAPES), len(_COLOURS), len(_COLOURS) + 1, 2)
    shape, colour, flash_out, place = out.split(sizes, -1)
    target = torch.tensor(labels, device=device)
    loss = F.mse_loss(place, torch.tensor(places, dtype=torch.float32, device=device)) * 10
    shares = {}
    for index, (name, logits) in enumerate(
        (("shape", shape), ("colour", colour), ("flash", flash_out))
    ):
        loss = loss + F.cross_entropy(logits, target[:, index])
        shares[name] = float((logits.argmax(-1) == target[:, index]).float().mean())
    return loss, shares


def _sound_loss(
    model: ComposerForConditionalGeneration,
    heads: TowerHeads,
    clips: list[Clip],
    rng: np.random.Generator,
) -> tuple[torch.Tensor, dict[str, float]]:
    features, lengths, labels = [], [], []
    stack = model.config.audio_stack
    token_s = stack / STATES_PER_SECOND
    for clip in clips:
        samples = augmented_sound(render_sound(clip, 0, clip.duration, SAMPLE_RATE), rng)
        features += mel_windows(model.config, samples)
        lengths += model.config.audio_states(len(samples))
        for index in range(lengths[-1] // stack):
            labels.append(sound_label(clip, index * token_s, (index + 1) * token_s))
    device = next(model.parameters()).device
    features = [window.to(device) for window in features]
    states = torch.stack(audio_states(model.audio_tower, features, lengths))
    tokens = states.unflatten(1, (-1, stack)).mean(dim=2).flatten(0, 1)
    parts = heads.sound(tokens).split((2, len(PITCHES), len(GLIDES)), -1)
    target = torch.tensor(labels, device=device)
    loss = torch.zeros((), device=device)
    shares = {}
    for index, (name, logits) in enumerate(zip(("tone", "pitch", "glide"), parts, strict=True)):
        known = target[:, index] != UNKNOWN
        loss = loss + F.cross_entropy(logits[known], target[known, index])
        shares[name] = float((logits[known].argmax(-1) == target[known, index]).float().mean())
    return loss, shares
