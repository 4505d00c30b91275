"""Where the batches of a training come from: the generator, or a folder of clips."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from vllm_mm_ext.composer.configuration import ComposerConfig
from vllm_mm_ext.composer.training.batches import Batch, make_batch
from vllm_mm_ext.composer.training.curriculum import draw_reduction, plan_samples, plan_step
from vllm_mm_ext.composer.training.folder import CONVERSATIONS, Conversation, load_sample
from vllm_mm_ext.composer.training.processes import rank, world
from vllm_mm_ext.composer.training.samples import Sample
from vllm_mm_ext.composer.training.trainer import Batches
from vllm_mm_ext.errors import MediaError

logger = logging.getLogger(__name__)


def generated_batches(config: ComposerConfig, tokenizer: Any, seed: int, ramp: int) -> Batches:
    """Batches of generated clips.

    Args:
        config: Of the model.
        tokenizer: Of the model.
        seed: Decides all clips.
        ramp: Steps over which clips grow to full length.
    """

    def batch(step: int) -> Batch:
        plan = plan_step(config, seed, step, ramp)
        samples = plan_samples(config, plan, seed, step, rank())
        return make_batch(config, tokenizer, samples, plan.pool, plan.temporal)

    return batch


def folder_batches(
    config: ComposerConfig,
    tokenizer: Any,
    conversations: list[Conversation],
    *,
    seed: int,
    clips: int,
    frames: int,
) -> Batches:
    """Batches of the conversations of a folder, in another order each time through.

    A conversation whose file cannot be decoded is passed over, with a warning.

    Args:
        config: Of the model.
        tokenizer: Of the model.
        conversations: Of the folder.
        seed: Decides order and reductions.
        clips: Conversations of a batch.
        frames: Frames of a clip at most.
    """
    warned: set[int] = set()

    def sample(position: int) -> Sample:
        epoch, place = divmod(position, len(conversations))
        order = np.random.default_rng((seed, 3, epoch)).permutation(len(conversations))
        for index in np.roll(order, -place).tolist():
            chosen = conversations[index]
            try:
                return load_sample(chosen, config, frames)
            except (MediaError, OSError) as error:
                # The next one takes its place: the same whenever the step is computed.
                if chosen.line not in warned:
                    warned.add(chosen.line)
                    where = f"{CONVERSATIONS}, line {chosen.line}: {chosen.name}"
                    logger.warning("%s is passed over: %s", where, error)
        raise ValueError(f"none of the files that {CONVERSATIONS} names can be decoded")

    def batch(step: int) -> Batch:
        first = (step * world() + rank()) * clips
        samples = [sample(first + index) for index in range(clips)]
        pool, temporal = draw_reduction(config, np.random.default_rng((seed, 4, step)))
        return make_batch(config, tokenizer, samples, pool, temporal)

    return batch


class Ahead:
    """Makes the next batch while a step computes.

    Args:
        batches: Batch of a step.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[Batch]] | None = None

    def __call__(self, step: int) -> Batch:
        """The batch of a step."""
        if self._next is None or self._next[0] != step:
            self._next = (step, self._pool.submit(self._batches, step))
        batch = self._next[1].result()
        self._next = (step + 1, self._pool.submit(self._batches, step + 1))
        return batch

    def close(self) -> None:
        """Drop what was prepared."""
        self._pool.shutdown(cancel_futures=True)
