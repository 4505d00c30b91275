"""Makes plans for a model: brings the pure planner together with the loaded model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil  # type: ignore[import-untyped]

from vllm_mm_ext.adapters.planning.counting import RequestCounter, check_countable
from vllm_mm_ext.adapters.planning.loading import CannotPlanError, LoadedModel, load
from vllm_mm_ext.adapters.planning.model_sizes import model_facts
from vllm_mm_ext.adapters.planning.warm_up import warm_up_bytes
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.planner.delivery import MAX_FRAMES, Delivery, frames_asked
from vllm_mm_ext.planner.gpu_facts import GpuFacts, Site
from vllm_mm_ext.planner.levers import Lever, levers
from vllm_mm_ext.planner.model_facts import ModelFacts
from vllm_mm_ext.planner.model_folder import model_folder
from vllm_mm_ext.planner.plan import Plan, Server, asked_delivery, make_plan
from vllm_mm_ext.planner.workload import Workload

# Families whose frames have sizes of their own.
_RESIZABLE = ("qwen_vl", "qwen3_vl")
# A little above what a process on a CPU takes that has loaded vLLM and the code of a model.
_GPU_SERVER_PROCESS = 1 << 30


@dataclass(frozen=True)
class Wishes:
    """What a user asks of a plan beside the workload.

    Attributes:
        context: ``--max-model-len``; None for as much as the workload needs.
        max_frames: Most frames of a video; None for as many as its rate asks for.
        resolution: A frame has at most this many pixels squared; None for the model's own bound.
        reduction: The token reduction; None for the checkpoint's own.
    """

    context: int | None = None
    max_frames: int | None = None
    resolution: int | None = None
    reduction: Reduction | None = None


class Planner:
    """Plans for one model.

    Args:
        model: Folder of the model's files, a ``config.json`` in it, or a name on the hub.
        name: What to call it in the written file; None for the folder or the name on the hub.
        mm_processor_kwargs: vLLM's ``--mm-processor-kwargs``.
        settings: The plugin's settings, ``additional_config.mm_ext``, where they are no defaults.

    Raises:
        ModelFilesError: Files are missing.
        CannotPlanError: The model is none that the planner can plan for.
    """

    def __init__(
        self,
        model: str,
        *,
        name: str | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.mm_processor_kwargs = dict(mm_processor_kwargs or {})
        given = dict(settings or {})
        self.settings = MMExtConfig.from_additional_config({"mm_ext": given})
        folder = model_folder(model)
        self.loaded: LoadedModel = load(
            folder,
            context=None,
            mm_processor_kwargs=self.mm_processor_kwargs,
            settings=given,
        )
        # vLLM serves a folder, no ``config.json`` in one.
        check_countable(name or folder, self.loaded)
        self.facts: ModelFacts = model_facts(name or folder, self.loaded)
        # After loading, as the processes of a server are when they have loaded the same.
        self.process_bytes: int = psutil.Process(os.getpid()).memory_info().rss
        self.counter = RequestCounter(self.loaded, self.facts, max_audio_s=_max_audio_s())

    def process_bytes_on(self, gpu: GpuFacts) -> int:
        """Memory of a process of the server before it serves.

        Args:
            gpu: What the model runs on. For a GPU, which this machine need not have, the same is
                said everywhere; an allowance for each GPU comes on top.
        """
        return self.process_bytes if gpu.is_cpu else _GPU_SERVER_PROCESS

    @property
    def default_reduction(self) -> Reduction:
        """The reduction of videos unless the user names one."""
        of_model = self.loaded.traits.default_reduction
        return self.settings.compression.default_reduction(of_model)

    def plan(self, workload: Workload, site: Site, wishes: Wishes) -> Plan:
        """Plan a server.

        Raises:
            CannotPlanError: The model cannot do what is asked.
            MediaError: The model does not take such a video.
        """
        server = self._server(workload)
        if wishes.resolution is not None and not server.resizable:
            raise CannotPlanError(
                f"--resolution {wishes.resolution}: all frames of {self.facts.name} have one size"
            )
        if why := self.facts.undivided(site.tp, site.dp):
            raise CannotPlanError(f"--tp {site.tp}: {why}")
        if wishes.context is not None and wishes.context > self.facts.max_context:
            raise CannotPlanError(
                f"--context {wishes.context}: the model supports {self.facts.max_context} tokens"
            )
        self._check_videos(workload, wishes)
        trained = self.loaded.traits.trained
        reduction = wishes.reduction or self.default_reduction
        if trained is not None and not trained.allow(reduction):
            raise CannotPlanError(f"--reduction: {self.facts.name} was trained for {trained}")
        delivery = Delivery(1, frame_pixels=(wishes.resolution or 0) ** 2, reduction=reduction)
        delivery = asked_delivery(workload, delivery, server.frame_multiple)
        if wishes.max_frames is not None and wishes.max_frames < delivery.max_frames:
            delivery = replace(
                delivery,
                max_frames=wishes.max_frames,
                min_frames=min(delivery.min_frames, wishes.max_frames),
            )
        return make_plan(
            self.facts,
            site,
            server,
            workload,
            delivery,
            self.counter.request,
            context=wishes.context,
        )

    def levers(self, plan: Plan) -> tuple[Lever, ...]:
        """The changes that make a plan fit which does not."""

        def replan(
            site: Site, delivery: Delivery, context: int | None, *, concurrency: int
        ) -> Plan:
            return make_plan(
                self.facts,
                site,
                plan.server,
                replace(plan.workload, concurrency=concurrency),
                delivery,
                self.counter.request,
                context=context,
            )

        trained = self.loaded.traits.trained
        choices = self.settings.quality.budget.reductions
        if trained is not None:
            choices = tuple(
                Reduction(pool=pool, temporal=temporal)
                for pool, temporal in sorted(trained.pairs, key=lambda pair: pair[0] ** 2 * pair[1])
            )
        return levers(plan, replan, choices)

    def _check_videos(self, workload: Workload, wishes: Wishes) -> None:
        longest_s = self.settings.media.decode.max_duration_s
        most_pixels = self.settings.media.decode.max_pixels
        for video in workload.videos:
            if video.seconds > longest_s:
                raise CannotPlanError(
                    f"--video: a server takes videos of {longest_s:g} s at most "
                    f"(media.decode.max_duration_s), got {video.seconds:g} s"
                )
            if video.width * video.height > most_pixels:
                raise CannotPlanError(
                    f"--video: a server takes pictures of {most_pixels:,} pixels at most "
                    f"(media.decode.max_pixels), got {video.width}x{video.height}"
                )
            if wishes.max_frames is None and frames_asked(video) > MAX_FRAMES:
                raise CannotPlanError(
                    f"--video: {video.seconds:g} s at {video.fps:g} fps are "
                    f"{frames_asked(video):,} frames, a server gives a video {MAX_FRAMES:,} at "
                    "most; ask for fewer frames a second, or for fewer frames with --max-frames"
                )

    def _server(self, workload: Workload) -> Server:
        traits, processor = self.loaded.traits, self.loaded.processor
        config = self.loaded.config.model_config
        kinds = {"video": workload.videos, "audio": workload.audios, "image": workload.images}
        limits = processor.info.get_supported_mm_limits()
        used = [kind for kind, media in kinds.items() if media and kind in limits]
        most = {}
        with self.loaded.naming_kwargs():
            if used:
                counts = dict.fromkeys(used, 1)
                found = processor.info.get_mm_max_tokens_per_item(config.max_model_len, counts)
                most = dict(found or {})
            warm_up = warm_up_bytes(self.loaded, used)
        return Server(
            segment_tokens=processor.segment_tokens,
            encoder_max_patches=self.settings.compression.encoder_max_patches,
            resizable=traits.size_rule.kind in _RESIZABLE,
            told_times=self.counter.told_times,
            frame_multiple=traits.frame_multiple,
            hears_video=bool(traits.hears_video),
            largest_item=max((most[kind] for kind in used if kind in most), default=0),
            warm_up=warm_up,
            default_reduction=self.default_reduction,
        )


def _max_audio_s() -> float:
    from vllm import envs

    return float(envs.VLLM_MAX_AUDIO_DECODE_DURATION_S)
