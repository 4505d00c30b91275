"""Plans with a bound on the pixels of frames are served so; what no server takes is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import yaml
from front import opened

from vllm_mm_ext.adapters.planning.loading import CannotPlanError
from vllm_mm_ext.adapters.planning.planner import Planner, Wishes
from vllm_mm_ext.planner.delivery import Delivery
from vllm_mm_ext.planner.gpu_facts import Site, gpu_of
from vllm_mm_ext.planner.plan_yaml import plan_yaml
from vllm_mm_ext.planner.workload import Image, Video, Workload
from vllm_mm_ext.plugin import register
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import make_clip

SECONDS = {"long.mp4": 6.0, "short.mp4": 2.0}


@cache
def planner_of(family: str) -> Planner:
    register()
    return Planner(str(checkpoint(family)))


def site_of(planner: Planner) -> Site:
    return Site(gpu_of("cpu", 8 << 30), 1, 1, None, 2, planner.process_bytes)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_videos_of_several_lengths_are_served_as_planned_unless_a_request_asks_for_more(
    family: str, tmp_path: Path
) -> None:
    for seed, (name, seconds) in enumerate(SECONDS.items()):
        make_clip(tmp_path / name, width=640, height=480, fps=10, duration=seconds, seed=seed)
    planner, model = planner_of(family), checkpoint(family)
    site = site_of(planner)
    videos = tuple(
        Video(seconds, 2.0, 640, 480, source_fps=10.0, sound=False) for seconds in SECONDS.values()
    )
    requests = Workload(videos)
    plan = planner.plan(requests, site, Wishes(resolution=112))
    unbounded, wide = (planner.plan(requests, site, Wishes(resolution=r)) for r in (None, 8192))
    assert plan.request.prompt < wide.request.prompt == unbounded.request.prompt
    text = plan_yaml(plan, command="plan", file_name="a.yaml", mm_processor_kwargs={})
    settings = {
        "model": str(model),
        "max_model_len": unbounded.context,
        "additional_config": yaml.safe_load(text)["additional-config"],
    }
    with opened(tmp_path, **settings) as front:
        served = front.render(*SECONDS)
        sharper = front.render("short.mp4", options={"resolution": 168})
    assert served.video_tokens == plan.request.by_modality()["video"]
    (asked,) = sharper.videos
    assert 112**2 < asked["size"][0] * asked["size"][1] <= 168**2


@pytest.mark.parametrize(
    ("workload", "words"),
    [
        (Workload(images=(Image(5000, 20),)), "--image.*5000x20.*ratio"),
        (Workload((Video(5 * 3600.0, 0.1),)), "14400 s at most.*got 18000 s"),
        (
            Workload((Video(8.0, width=8192, height=8192),)),
            "35,389,440 pixels at most.*got 8192x8192",
        ),
        (Workload((Video(7200.0, 2.0),)), "14,400 frames.*4,096 at most.*--max-frames"),
    ],
)
def test_what_no_server_takes_is_refused_with_the_limit(workload: Workload, words: str) -> None:
    planner = planner_of("qwen2_5_vl")
    with pytest.raises(CannotPlanError, match=words):
        planner.plan(workload, site_of(planner), Wishes())


def test_videos_are_counted_in_segments_of_the_configured_size() -> None:
    small = Planner(str(checkpoint("qwen2_5_vl")), settings={"segments": {"tokens": 64}})
    workload = Workload((Video(16.0, 2.0, 320, 240, source_fps=10.0, sound=False),))
    items, tokens = [], []
    for planner in (planner_of("qwen2_5_vl"), small):
        delivery = Delivery(32, reduction=planner.default_reduction)
        counted = planner.counter.request(workload, delivery)
        items.append(len(counted.media[0].items))
        tokens.append(counted.prompt)
    assert items[1] > items[0]
    assert tokens[1] >= tokens[0]
