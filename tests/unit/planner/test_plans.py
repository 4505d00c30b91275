"""Plans and the changes that make them fit, for a model of plain numbers."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
from dataclasses import replace
from itertools import pairwise

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planner_facts import LLAMA_70B
from rich.console import Console

from vllm_mm_ext.config.media_settings import DecodeConfig
from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.config.quality_settings import BudgetSettings
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.planner.delivery import Delivery, frame_times
from vllm_mm_ext.planner.gpu_facts import GIB, Site, gpu_of
from vllm_mm_ext.planner.levers import levers
from vllm_mm_ext.planner.model_facts import EncoderFacts
from vllm_mm_ext.planner.plan import Plan, Server, asked_delivery, make_plan
from vllm_mm_ext.planner.plan_yaml import plan_yaml, serve_command
from vllm_mm_ext.planner.request_tokens import MediumTokens, RequestTokens
from vllm_mm_ext.planner.video_tokens import EncoderShape, video_tokens
from vllm_mm_ext.planner.workload import Video, Workload
from vllm_mm_ext.tools.cli.plan_tables import show_plan
from vllm_mm_ext.video.segments import VideoLayout

FACTS = replace(
    LLAMA_70B,
    weight_bytes=2 * GIB,
    text=replace(LLAMA_70B.text, layers=16, hidden=2048, intermediate=8192),
)
SERVER = Server(
    1024,
    16_384,
    resizable=True,
    told_times=True,
    frame_multiple=2,
    hears_video=False,
    largest_item=1024,
    warm_up=0,
    default_reduction=NO_REDUCTION,
)
# No control characters, which YAML does not take, but line breaks.
TEXT = st.characters(exclude_categories=["C"]) | st.sampled_from("\n\t\x85")
REDUCTIONS = BudgetSettings().reductions


def count(workload: Workload, delivery: Delivery) -> RequestTokens:
    """Frames of 448 x 448 pixels, or as few as the delivery allows, in patches of 28 x 28."""
    media = []
    for video in workload.videos:
        times = frame_times(video, delivery, 2)
        side = min(448, int((delivery.frame_pixels or 448**2) ** 0.5)) // 28
        layout = VideoLayout((28 * side, 28 * side), len(times) // 2 or 1, side, side, 2)
        stages, items = video_tokens(
            layout, delivery.reduction, 1024, EncoderShape(14), frames=len(times), text=0
        )
        size = (28 * side, 28 * side)
        media.append(MediumTokens("video", video.seconds, (1280, 720), size, 0.0, stages, items))
    return RequestTokens(workload.text, workload.output, tuple(media))


def planned(
    site: Site,
    workload: Workload,
    context: int | None = None,
    reduction: Reduction | None = None,
    server: Server = SERVER,
) -> Plan:
    delivery = asked_delivery(workload, Delivery(1, reduction=reduction or Reduction()), 2)
    return make_plan(FACTS, site, server, workload, delivery, count, context=context)


def levers_of(plan: Plan):
    def replan(site: Site, delivery: Delivery, context: int | None, *, concurrency: int) -> Plan:
        workload = replace(plan.workload, concurrency=concurrency)
        return make_plan(FACTS, site, SERVER, workload, delivery, count, context=context)

    return {lever.name: lever for lever in levers(plan, replan, REDUCTIONS)}


def site(gpu: str = "24gb") -> Site:
    return Site(gpu_of(gpu, 16 * GIB), 1, 1, 16 * GIB if gpu == "cpu" else None, 16, GIB)


@settings(max_examples=20)
@example(seconds=256.0, fps=0.5, concurrency=44, context=None)
@example(seconds=20.0, fps=1.0, concurrency=2, context=131_072)
@given(
    seconds=st.floats(2, 400),
    fps=st.sampled_from([0.5, 1.0, 2.0]),
    concurrency=st.integers(1, 60),
    context=st.sampled_from([None, 4096, 16_384, 131_072]),
)
def test_every_change_that_is_offered_makes_the_plan_fit_and_no_smaller_one_does(
    seconds, fps, concurrency, context
):
    workload = Workload((Video(seconds, fps=fps),), concurrency=concurrency)
    plan = planned(site(), workload, context)
    if plan.fits:
        assert plan.concurrency_that_fits >= concurrency
        return
    assert plan.problems()
    found = levers_of(plan)
    assert all(lever.plan.fits for lever in found.values())
    if frames := found.get("frames"):
        more = replace(frames.plan.delivery, max_frames=frames.plan.delivery.max_frames + 2)
        larger = make_plan(FACTS, plan.site, SERVER, workload, more, count, context=context)
        assert not larger.fits
    if fewer := found.get("concurrency"):
        one_more = replace(workload, concurrency=fewer.plan.workload.concurrency + 1)
        assert not make_plan(
            FACTS, plan.site, SERVER, one_more, plan.delivery, count, context=context
        ).fits


def test_a_context_that_is_too_short_names_the_one_that_is_needed():
    workload = Workload((Video(60, fps=2),), concurrency=1)
    plan = planned(site("h100-80gb"), workload, context=8192)
    (problem,) = plan.problems()
    assert f"{plan.context_needed:,}" in problem
    assert "8,192" in problem
    lever = levers_of(plan)["context"]
    assert lever.plan.context >= plan.context_needed
    assert lever.setting == f"--context {lever.plan.context}"


def test_a_context_that_the_kv_cache_cannot_hold_names_the_longest_that_it_holds():
    large = Site(gpu_of("8gb", 0), 1, 1, None, 16, GIB)
    plan = planned(large, Workload((Video(20),), concurrency=1), context=131_072)
    (problem,) = plan.problems()
    assert "131,072" in problem
    assert plan.concurrency_that_fits >= 1
    lever = levers_of(plan)["context"]
    assert lever.plan.fits
    assert plan.context_needed <= lever.plan.context < 131_072
    assert lever.plan.context + 1024 > plan.kv_blocks * plan.block_size


def test_on_a_cpu_the_kv_cache_holds_exactly_the_requests_that_are_planned():
    plan = planned(site("cpu"), Workload((Video(20),), concurrency=7))
    assert plan.concurrency_that_fits == 7
    assert plan.kv_blocks == 7 * plan.blocks


@settings(max_examples=30)
@given(name=st.text(TEXT, min_size=1, max_size=12), value=st.text(TEXT, max_size=12))
@example(name="a: b #c", value="it's\n- a: 'line'")
@example(name="no", value="1e3")
def test_names_and_values_of_any_characters_are_read_as_they_are(name, value):
    plan = planned(site("cpu"), Workload(concurrency=1))
    plan = replace(plan, facts=replace(FACTS, name=name))
    kwargs = {"key": value}
    text = plan_yaml(
        plan, command=f"plan '{value}'", file_name="a.yaml", mm_processor_kwargs=kwargs
    )
    read = yaml.safe_load(text)
    assert read["model"] == name
    assert json.loads(read["mm-processor-kwargs"]) == kwargs


def test_the_command_that_serves_a_plan_is_one_that_a_shell_takes():
    plan = planned(site("cpu"), Workload(concurrency=1))
    plan = replace(plan, facts=replace(FACTS, name="/my models/it's"))
    words = ["VLLM_PLUGINS=mm_ext", "vllm", "serve", "/my models/it's", "--config", "a plan.yaml"]
    assert shlex.split(serve_command(plan, "a plan.yaml")) == words


@given(concurrency=st.integers(1, 300))
@settings(max_examples=20)
def test_quality_is_full_while_one_request_more_than_planned_waits(concurrency):
    plan = planned(site("cpu"), Workload(concurrency=concurrency))
    text = plan_yaml(plan, command="plan", file_name="a.yaml", mm_processor_kwargs={})
    read = yaml.safe_load(text)
    tiers = MMExtConfig.from_additional_config(read["additional-config"]).quality.tiers
    assert tiers.batch[0] > concurrency + 1
    assert tiers.load[0] > (concurrency + 1) / concurrency


def test_the_kv_cache_holds_a_request_as_long_as_the_context():
    plan = planned(site("cpu"), Workload((Video(2),), concurrency=1), context=65_536)
    assert plan.fits
    assert plan.kv_blocks * plan.block_size >= plan.context


def test_on_gpus_the_memory_of_the_machine_has_every_process_and_cache_of_each_replica():
    workload = Workload((Video(20),), concurrency=8)
    one = planned(site("h100-80gb"), replace(workload, concurrency=4))
    two = planned(replace(site("h100-80gb"), dp=2, cores=32), workload)
    assert two.front == one.front
    machine = sum(part.num_bytes for part in one.host)
    assert sum(part.num_bytes for part in two.host) == 2 * machine
    assert machine >= (
        2 * GIB
        + one.host_tier_bytes
        + (one.front.encoded_mb - 1 + one.front.decoded_mb - 1 + one.front.in_flight_mb << 20)
    )
    enough, short = (replace(two.site, host_memory=2 * machine - less) for less in (0, 1))
    assert planned(enough, workload).fits
    (problem,) = planned(short, workload).problems()
    assert "memory of the machine" in problem


@pytest.mark.parametrize("gpu", ["cpu", "h100-80gb"])
def test_the_memory_of_the_machine_has_all_that_the_written_file_lets_media_take(gpu):
    plan = planned(site(gpu), Workload((Video(60, fps=2.0),), concurrency=64))
    text = plan_yaml(plan, command="vllm-mm plan", file_name="a.yaml", mm_processor_kwargs={})
    read = yaml.safe_load(text)["additional-config"]
    cache = MMExtConfig.from_additional_config(read).media.cache
    written = cache.encoded_mb + cache.decoded_mb + cache.in_flight_mb
    names = {"encoded files", "frames and sound", "media that are worked on"}
    # Each size is written in whole MiB.
    assert sum(part.num_bytes for part in plan.host if part.name in names) > written - 3 << 20


@pytest.mark.parametrize("gpu", ["cpu", "h100-80gb"])
def test_a_plan_is_shown_with_each_part_of_the_machine_s_memory(gpu):
    plan, shown = planned(site(gpu), Workload((Video(60),), concurrency=4)), io.StringIO()
    show_plan(Console(file=shown, width=200), plan, (), None)
    assert "media.cache.in_flight_mb" in shown.getvalue()
    assert all(part.name in shown.getvalue() for part in plan.host)


def test_a_container_gets_more_than_the_plan_counts_and_shared_memory_for_the_host_tiers():
    workload = Workload((Video(20),), concurrency=8)
    for gpus in (1, 2, 4):
        plan = planned(replace(site("h100-80gb"), dp=gpus, cores=16 * gpus), workload)
        needed = plan.container
        assert needed.memory_gib * GIB >= 1.25 * sum(part.num_bytes for part in plan.host)
        assert needed.memory_gib > needed.shm_gib
        assert needed.shm_gib * GIB >= gpus * plan.host_tier_bytes + GIB
        assert needed.cores == 16 * gpus
    # Without a GPU workers keep the host tier in memory of their own.
    assert planned(site("cpu"), workload).container.shm_gib == 1


@pytest.mark.parametrize("mib", [10, 400, 4000])
def test_processes_have_room_for_vllm_s_warm_up_before_they_serve(mib):
    workload = Workload((Video(20),), concurrency=2)
    usual = planned(site("cpu"), workload)
    plan = planned(site("cpu"), workload, server=replace(SERVER, warm_up=mib << 20))
    for parts, before in ((plan.front.memory, usual.front.memory), (plan.engine, usual.engine)):
        held = sum(part.num_bytes for part in parts)
        # A process gives the memory of its warm-up back before it serves.
        assert sum(part.num_bytes for part in before) <= held
        assert held > 2 * (mib << 20)
        if mib == 10:
            assert held == sum(part.num_bytes for part in before)


def test_replicas_share_the_requests():
    workload = Workload((Video(20),), concurrency=9)
    plan = planned(replace(site("h100-80gb"), dp=2), workload)
    assert plan.per_engine == plan.step.sequences == 5


@pytest.mark.parametrize("gpu", ["cpu", "h100-80gb"])
def test_every_value_of_the_written_file_has_a_reason_and_the_plugin_takes_its_settings(gpu):
    workload = Workload((Video(20, fps=2.0),), concurrency=3)
    plan = planned(site(gpu), workload, reduction=Reduction(temporal=2))
    text = plan_yaml(plan, command="vllm-mm plan", file_name="a.yaml", mm_processor_kwargs={})
    settings_read = yaml.safe_load(text)
    config = MMExtConfig.from_additional_config(settings_read["additional-config"])
    assert config.media.sampling.max_frames == plan.delivery.max_frames
    assert config.compression.reduction == plan.delivery.reduction
    assert settings_read["max-num-seqs"] == 3
    # Its `usage` would tell clients of cache hits, which `reports.cache_hits` is for.
    assert "enable-prompt-tokens-details" not in settings_read
    lines = text.splitlines()
    sections = ("additional-config:", "mm_ext:", "quality:", "media:")
    for before, line in pairwise(lines):
        said = before.lstrip().startswith("#")
        follows = line.startswith("ec-transfer-config:")
        heads = any(before.strip().startswith(word) for word in sections)
        inside = line.strip().startswith(("#", *sections)) or heads
        assert said or follows or inside, line


@pytest.mark.parametrize("gpu", ["cpu", "h100-80gb"])
def test_a_server_of_text_alone_has_no_tiers_of_encoder_outputs(gpu):
    plan = planned(site(gpu), Workload(text=500, concurrency=4))
    text = plan_yaml(plan, command="vllm-mm plan", file_name="a.yaml", mm_processor_kwargs={})
    read = yaml.safe_load(text)
    assert set(json.loads(read["limit-mm-per-prompt"]).values()) == {0}
    # With limits of 0 vLLM finds no encoder outputs to measure, and does not start a connector.
    assert "ec-transfer-config" not in read
    assert "encoder_cache" not in read["additional-config"]["mm_ext"]
    MMExtConfig.from_additional_config(read["additional-config"])


@pytest.mark.parametrize("asked", [NO_REDUCTION, Reduction(pool=2)])
def test_the_written_file_serves_the_planned_reduction_where_the_checkpoint_has_its_own(asked):
    own = Reduction(pool=2, temporal=4)
    plan = planned(site("cpu"), Workload((Video(20, fps=2.0),)), reduction=asked)
    plan = replace(plan, server=replace(plan.server, default_reduction=own))
    text = plan_yaml(plan, command="vllm-mm plan", file_name="a.yaml", mm_processor_kwargs={})
    config = MMExtConfig.from_additional_config(yaml.safe_load(text)["additional-config"])
    assert config.compression.default_reduction(own) == asked


def test_gpus_share_a_model_only_if_all_its_heads_divide():
    # Qwen2.5-VL-7B: 28 heads, 4 KV heads, 16 heads of the vision encoder.
    text, vision = replace(FACTS.text, heads=28, kv_heads=4), replace(FACTS.vision, heads=16)
    text = replace(text, intermediate=28 * 1024)
    vision = replace(vision, intermediate=28 * 1024)
    model = replace(FACTS, text=text, vision=vision)
    assert [tp for tp in range(1, 29) if not model.undivided(tp)] == [1, 2, 4]
    assert "28 attention heads" in model.undivided(8)
    assert "4 KV heads" in model.undivided(14)
    assert "vision encoder has 16" in replace(
        model, text=replace(text, heads=32, kv_heads=32)
    ).undivided(32)


@settings(max_examples=20)
@given(seconds=st.floats(10, 2000), side=st.sampled_from([448, 1120, 2240]))
def test_the_server_that_is_written_takes_the_videos_of_the_plan(seconds, side):
    def count_large(workload: Workload, delivery: Delivery) -> RequestTokens:
        found = count(workload, delivery)
        media = tuple(replace(medium, size=(side, side)) for medium in found.media)
        return replace(found, media=media)

    workload = Workload((Video(seconds, fps=2.0),), concurrency=1)
    delivery = asked_delivery(workload, Delivery(1), 2)
    plan = make_plan(FACTS, site("h100-80gb"), SERVER, workload, delivery, count_large)
    text = plan_yaml(plan, command="plan", file_name="a.yaml", mm_processor_kwargs={})
    read = yaml.safe_load(text)["additional-config"]
    decode = MMExtConfig.from_additional_config(read).media.decode
    (video,) = plan.request.media
    needed = video.stages.sampled * side * side * 3
    usual = DecodeConfig()
    assert needed <= decode.max_output_mb << 20
    assert decode.max_output_mb <= max(usual.max_output_mb, math.ceil(needed / (1 << 20)))
    # vLLM's own bound for a request, which 0.33 reads from the environment.
    bound = re.search(r"VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES=(\d+) VLLM_PLUGINS", text)
    sound = round(video.audio_seconds * 16_000) * 4
    assert needed + sound <= (715_827_880 if bound is None else int(bound[1]))
    # Beside the frames a worker has as much as by default.
    beside = decode.worker_memory_mb - decode.max_output_mb
    assert beside == usual.worker_memory_mb - usual.max_output_mb


def test_frames_that_no_server_may_make_are_a_problem_with_need_and_limit():
    def count_huge(workload: Workload, delivery: Delivery) -> RequestTokens:
        found = count(workload, delivery)
        return replace(found, media=tuple(replace(m, size=(8192, 8192)) for m in found.media))

    workload = Workload((Video(400, fps=1.0),), concurrency=1)
    delivery = asked_delivery(workload, Delivery(1), 2)
    plan = make_plan(FACTS, site("h100-80gb"), SERVER, workload, delivery, count_huge)
    (problem,) = [found for found in plan.problems() if found.startswith("frames")]
    assert "76,800 MiB" in problem
    assert "65,536" in problem


@pytest.mark.parametrize("concurrency", [1, 2048, 2049, 40_000])
def test_a_step_has_a_token_of_every_request_that_runs(concurrency):
    plan = planned(site("h100-80gb"), Workload(concurrency=concurrency))
    assert plan.step.tokens >= plan.step.sequences == concurrency


def test_gpus_share_a_model_only_if_the_widths_of_its_mlps_divide():
    # Qwen2.5-VL: 16 heads of the vision encoder divide by 8, its MLPs of 3420 do not.
    text = replace(FACTS.text, heads=32, kv_heads=8)
    vision = replace(FACTS.vision, heads=16, intermediate=3420)
    model = replace(FACTS, text=text, vision=vision)
    assert [tp for tp in (1, 2, 4, 8) if not model.undivided(tp)] == [1, 2, 4]
    assert "vision encoder are 3420 wide" in model.undivided(8)
    assert "MLPs are 8190 wide" in replace(FACTS, text=replace(text, intermediate=8190)).undivided(
        4
    )
    # InternVL's attention is whole on each GPU, its MLPs are not.
    whole = replace(vision, heads=25, intermediate=3200, divides_heads=False)
    assert not replace(model, vision=whole).undivided(2)
    assert replace(model, vision=replace(whole, divides_heads=True)).undivided(2)
    assert "3210 wide" in replace(model, vision=replace(whole, intermediate=3210)).undivided(4)
    # All GPUs of all replicas share the experts.
    experts = replace(FACTS, text=replace(text, experts=128, experts_per_token=8, intermediate=768))
    assert not experts.undivided(2, 128)
    assert "experts are 768 wide, which must be divisible by 512" in experts.undivided(2, 256)


def test_gpus_share_a_model_only_if_its_audio_encoder_divides_or_is_whole_on_each():
    vision = replace(FACTS.vision, heads=16)
    audio = EncoderFacts("audio", 12, 768, 3072, 12, 0, 256, 2, 2048)
    model = replace(FACTS, vision=vision, audio=audio)
    assert [tp for tp in (1, 2, 4, 8) if not model.undivided(tp)] == [1, 2, 4]
    assert "the audio encoder has 12 attention heads" in model.undivided(8)
    assert "MLPs of the audio encoder are 3074 wide" in replace(
        model, audio=replace(audio, intermediate=3074)
    ).undivided(4)
    assert not replace(model, audio=replace(audio, divides_heads=False)).undivided(8)


def test_the_weights_of_a_gpu_are_what_is_whole_and_its_share_of_the_rest():
    audio = EncoderFacts("audio", 32, 1280, 5120, 20, 0, 256, 1, 2048, divided_bytes=60)
    mixture = replace(FACTS, weight_bytes=10_000, whole_bytes=100, expert_bytes=8000, audio=audio)
    # 20 heads divide by 2 and by 4, not by 8.
    assert mixture.weights_per_gpu(1) == 10_000
    assert mixture.weights_per_gpu(2) == 100 + 1900 // 2 + 8000 // 2
    assert mixture.weights_per_gpu(2, 4) == 100 + 1900 // 2 + 8000 // 8
    assert mixture.weights_per_gpu(8, 1) == 100 + 60 + 1840 // 8 + 8000 // 8
    dense = replace(FACTS, weight_bytes=10_000)
    assert dense.weights_per_gpu(1, 4) == 10_000


def test_replicas_share_the_experts_of_a_mixture_and_see_each_others_tokens():
    text = replace(FACTS.text, experts=128, experts_per_token=8, intermediate=768)
    mixture = replace(FACTS, text=text, expert_bytes=GIB, weight_bytes=2 * GIB)
    workload = Workload((Video(20),), concurrency=8)
    delivery = asked_delivery(workload, Delivery(1), 2)

    def parts(dp: int) -> dict[str, int]:
        place = replace(site("h100-80gb"), dp=dp)
        requests = replace(workload, concurrency=8 * dp)
        plan = make_plan(mixture, place, SERVER, requests, delivery, count)
        return {part.name: part.num_bytes for part in plan.engine}

    one, four = parts(1), parts(4)
    assert one["weights"] == 2 * GIB
    assert four["weights"] == GIB + GIB // 4
    assert four["text model, one step"] > one["text model, one step"]
