"""NVDEC: the same frames as on the CPU, and the CPU for whatever the GPU cannot or should not do.

Tests that need a GPU are skipped where there is none. In their place, an emulated GPU hands on the
pictures of FFmpeg's own decoders in the formats of GPU memory.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from fake_worker import FakeWorker
from hypothesis import given
from hypothesis import strategies as st
from packet_tables import regular_table

from vllm_mm_ext.config.media_settings import DecodeConfig
from vllm_mm_ext.errors import InternalMediaError
from vllm_mm_ext.media.decode import pool as pool_module
from vllm_mm_ext.media.decode import wire
from vllm_mm_ext.media.decode.decoders import get_decoder, nvdec_decoder, nvdec_device
from vllm_mm_ext.media.decode.decoders.nvdec_decoder import (
    RefusedError,
    ability_for,
    lanes_for,
    same_samples,
    work,
    worth_it,
)
from vllm_mm_ext.media.decode.decoders.nvdec_device import Ability, Gpu, NoGpuError
from vllm_mm_ext.media.decode.decoders.reader import Reader
from vllm_mm_ext.media.decode.gpu_seats import GpuSeats, gpu_rules, visible_devices
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.picture import write_rgb
from vllm_mm_ext.media.decode.pool import DecodePool
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.decode.worker_process import worker_environment
from vllm_mm_ext.media.types import (
    AS_PLAYERS,
    DecodeLimits,
    DecodeRequest,
    GpuRules,
    SamplingSpec,
)
from vllm_mm_ext.testing.media import make_clip, read_stamp

LIMITS = DecodeLimits()
H264 = Ability("h264", "4:2:0", 8, 4096, 4096, 65536 * 256, 3)
ABILITIES = (H264, *(replace(H264, codec=codec) for codec in ("hevc", "vp9", "av1")))
KINDS = {
    "h264": {"name": "a.mp4", "codec": "libx264"},
    "h264-bframes": {"name": "a.mp4", "codec": "libx264", "bframes": 3},
    "h264-open-gop-mkv": {"name": "a.mkv", "codec": "libx264", "bframes": 3, "open_gop": True},
    "h264-ts": {"name": "a.ts", "codec": "libx264", "bframes": 2},
    "h264-rotated": {"name": "a.mp4", "codec": "libx264", "bframes": 2, "rotation": 90},
    "h264-vfr": {"name": "a.mkv", "codec": "libx264", "bframes": 2, "vfr": True},
    "hevc-open-gop": {"name": "a.mp4", "codec": "libx265", "bframes": 3, "open_gop": True},
    "vp9": {"name": "a.webm", "codec": "libvpx-vp9"},
    "av1": {"name": "a.mp4", "codec": "libsvtav1"},
}


def gpu_here() -> bool:
    try:
        nvdec_device.gpu()
    except NoGpuError:
        return False
    return True


NEEDS_GPU = pytest.mark.skipif(not gpu_here(), reason="no GPU that decodes video")
NO_GPU = pytest.mark.skipif(gpu_here(), reason="there is a GPU that decodes video")


@pytest.fixture(autouse=True)
def seated(monkeypatch):
    """This process may use a GPU, as a worker with a seat."""
    monkeypatch.setattr(nvdec_device, "has_seat", lambda: True)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """The description of a video stream, to be altered."""
    path = make_clip(tmp_path_factory.mktemp("clip") / "a.mp4", duration=0.2).path
    return replace(probe(str(path), LIMITS).video, width=1000, height=1000)


def clip(tmp_path, kind, **options):
    options = {"gop": 15, "duration": 2.5, "stamp": True} | KINDS[kind] | options
    return str(make_clip(tmp_path / options.pop("name"), **options).path)


def nvdec(**options):
    options = {"rules": GpuRules(), "always": True, "seconds": 60.0} | options
    return nvdec_decoder.NvdecDecoder(LIMITS.max_pixels, **options)


def decode(decoder, path, rows, size=None):
    info = probe(path, LIMITS)
    height, width = size or (info.video.height, info.video.width)
    out = np.zeros((len(rows), height, width, 3), np.uint8)
    done = decoder.decode(path, info, np.array(rows, np.int64), size, out, 2)
    return out, done.tolist()


def on_cpu(path, rows, size=None):
    return decode(get_decoder("pyav", max_pixels=LIMITS.max_pixels), path, rows, size)


def fake_gpu(*abilities):
    """A GPU that says what it can do, and was never opened."""
    gpu = object.__new__(Gpu)
    gpu.abilities = abilities or ABILITIES
    gpu._lock, gpu._failures, gpu._rest_until = nvdec_device.threading.Lock(), 0, 0.0
    return gpu


class EmulatedReader(Reader):
    """Reads on the CPU and hands pictures on in the format that they would have on a GPU."""

    strict = True
    broken_after = 1 << 30
    opened = 0

    def __init__(self, path, video, max_pixels, _deadline):
        super().__init__(path, video.index, max_pixels, 1)
        type(self).opened += 1
        self._packets_left = self.broken_after

    def decode(self, packet, *, needed=True):
        self._packets_left -= 1
        if self._packets_left < 0:
            raise av.ExternalError(1, "the driver fell over")
        return super().decode(packet, needed=needed)

    def fetch(self, frame):
        there = self.converter.reformat(frame, format="nv12")
        return same_samples(there, "nv12", frame.format.name, self.converter)


@pytest.fixture
def emulated(monkeypatch):
    """An emulated GPU; yields its reader class."""
    reader = type("Emulated", (EmulatedReader,), {})
    gpu = fake_gpu()
    monkeypatch.setattr(nvdec_device, "gpu", lambda: gpu)
    monkeypatch.setattr(nvdec_decoder, "_GpuReader", reader)
    return reader


# --- exactness ------------------------------------------------------------------------------------


@NEEDS_GPU
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [None, (56, 112)])
def test_frames_of_the_gpu_are_byte_for_byte_those_of_the_cpu(tmp_path, kind, size):
    path = clip(tmp_path, kind)
    rows = [0, 3, 3, *range(8, 30, 7)]
    decoder = nvdec()
    ours, done = decode(decoder, path, rows, size)
    assert (decoder.name, decoder.note) == ("nvdec", "")
    expected, expected_done = on_cpu(path, rows, size)
    assert done == expected_done
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_an_emulated_gpu_are_byte_for_byte_those_of_the_cpu(tmp_path, kind):
    path = clip(tmp_path, kind)
    rows = [0, 3, 3, *range(8, 30, 7)]
    for size in (None, (56, 112)):
        decoder = nvdec()
        ours, done = decode(decoder, path, rows, size)
        assert (decoder.name, decoder.note) == ("nvdec", "")
        expected, expected_done = on_cpu(path, rows, size)
        assert done == expected_done
        np.testing.assert_array_equal(ours, expected)


def test_as_many_decoders_work_on_a_file_as_there_are_engines(tmp_path, emulated):
    path = clip(tmp_path, "h264")
    rows = list(range(0, 75, 5))
    ours, _ = decode(nvdec(), path, rows)
    assert emulated.opened == H264.engines
    np.testing.assert_array_equal(ours, on_cpu(path, rows)[0])


@pytest.mark.parametrize("where", ["emulated", pytest.param("gpu", marks=NEEDS_GPU)])
def test_frames_at_hand_from_thumbnails_are_not_decoded_again(
    tmp_path, request, where, monkeypatch
):
    if where == "emulated":
        request.getfixturevalue("emulated")
    path = clip(tmp_path, "h264-bframes")
    info = probe(path, LIMITS)
    decoder = nvdec(keep_bytes=1 << 30)
    small = decoder.thumbnails(path, info, np.array([2, 30, 60]), 160, 2, keep=[2, 60])
    assert [read_stamp(luma) for luma in small[:, : small.shape[1] * 2 // 3]] == [2, 30, 60]
    assert decoder.name == "nvdec"
    monkeypatch.setattr(decoder, "_on_gpu", lambda *_: pytest.fail("decoded again"))
    ours, _ = decode(decoder, path, [2, 60])
    assert decoder.name == "nvdec"
    np.testing.assert_array_equal(ours, on_cpu(path, [2, 60])[0])


SAME = sorted(nvdec_decoder._SAME_SAMPLES)


@pytest.mark.parametrize(("there", "here"), SAME)
def test_samples_survive_the_way_from_gpu_formats(there, here):
    bits = av.VideoFormat(here, 8, 8).components[0].bits
    picture = noise(here, bits)
    converter = VideoReformatter()
    semi = converter.reformat(picture, format=there)
    back = same_samples(semi, there, here, converter)
    assert back.format.name == here
    for plane, expected in zip(back.planes, picture.planes, strict=True):
        assert samples(plane, bits).tolist() == samples(expected, bits).tolist()


def noise(name, bits, width=64, height=36):
    rng = np.random.default_rng(0)
    frame = VideoFrame(width, height, name)
    frame.color_range = 2 if "j" in name else 1
    for plane in frame.planes:
        dtype = np.uint8 if bits == 8 else np.uint16
        values = rng.integers(0, 1 << bits, plane.buffer_size // dtype().itemsize, dtype)
        plane.update(values.tobytes())
    return frame


def samples(plane, bits):
    dtype = np.dtype(np.uint8 if bits == 8 else np.uint16)
    lines = np.frombuffer(memoryview(plane), dtype).reshape(-1, plane.line_size // dtype.itemsize)
    return lines[:, : plane.width]


@pytest.mark.parametrize(("here", "there"), [("yuv420p", "nv12"), ("yuv420p10le", "p010le")])
@pytest.mark.parametrize("matrix", [1, 5, 9])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("curve", [1, 16, 18])  # BT.709, PQ, HLG
@pytest.mark.parametrize("size", [(36, 64), (20, 30)])
def test_colours_follow_the_same_tags_after_the_way_from_gpu_formats(
    video, here, there, matrix, full, curve, size
):
    picture = noise(here, 8 if there == "nv12" else 10)
    picture.colorspace, picture.color_range = matrix, 2 if full else 1
    picture.color_trc = curve
    converter = VideoReformatter()
    back = same_samples(converter.reformat(picture, format=there), there, here, converter)
    shown = [np.zeros((*size, 3), np.uint8) for _ in range(2)]
    for frame, out in zip((picture, back), shown, strict=True):
        write_rgb(frame, converter, video, AS_PLAYERS, out)
    np.testing.assert_array_equal(*shown)


def test_a_format_that_does_not_hold_the_same_samples_is_refused():
    with pytest.raises(RefusedError):
        same_samples(noise("nv12", 8), "nv12", "yuva420p", VideoReformatter())


# --- the CPU takes over ---------------------------------------------------------------------------


@NO_GPU
def test_without_a_driver_the_cpu_decodes_and_the_result_says_why(tmp_path):
    path = clip(tmp_path, "h264-bframes")
    request = DecodeRequest(
        sampling=SamplingSpec("explicit", indices=(0, 9, 40)), decoder="nvdec", limits=LIMITS
    )
    result = run_job(path, request)
    assert result.decoder == "pyav"
    assert "driver" in result.decoder_note
    np.testing.assert_array_equal(result.frames, on_cpu(path, [0, 9, 40])[0])


@NO_GPU
def test_a_gpu_that_cannot_be_opened_for_a_file_rests_and_the_cpu_decodes(tmp_path, monkeypatch):
    gpu = fake_gpu()
    monkeypatch.setattr(nvdec_device, "gpu", lambda: gpu)
    path = clip(tmp_path, "h264")
    for note in (True, False):  # The second time it is not even tried.
        decoder = nvdec()
        ours, done = decode(decoder, path, [0, 20])
        assert (decoder.name, bool(decoder.note), done) == ("pyav", note, [0, 1])
        np.testing.assert_array_equal(ours, on_cpu(path, [0, 20])[0])
        assert gpu.resting


def test_an_error_in_the_middle_has_the_cpu_decode_all(tmp_path, emulated):
    path = clip(tmp_path, "h264-bframes")
    emulated.broken_after = 3
    decoder = nvdec()
    ours, done = decode(decoder, path, [0, 20, 70])
    assert (decoder.name, done) == ("pyav", [0, 1, 2])
    assert "the driver fell over" in decoder.note
    np.testing.assert_array_equal(ours, on_cpu(path, [0, 20, 70])[0])


def test_where_the_gpu_loses_frames_the_cpu_says_which_there_are(tmp_path, monkeypatch, emulated):
    path = clip(tmp_path, "h264")
    monkeypatch.setattr(emulated, "decode", lambda *_, **__: [])
    decoder = nvdec()
    _, done = decode(decoder, path, [0, 20])
    # That may be the file's fault: the GPU goes on, and nobody is warned.
    assert (decoder.name, decoder.note, done) == ("pyav", "", [0, 1])
    assert not nvdec_device.gpu().resting


def test_a_gpu_that_takes_too_long_is_left(tmp_path, monkeypatch, emulated):
    monkeypatch.setattr(
        emulated, "decode", lambda *_, **__: (_ for _ in ()).throw(TimeoutError("too long"))
    )
    decoder = nvdec(seconds=0.0)
    _, done = decode(decoder, clip(tmp_path, "h264"), [0, 20])
    assert (decoder.name, decoder.note, done) == ("pyav", "TimeoutError: too long", [0, 1])


def test_a_worker_that_hangs_in_the_driver_ends_itself():
    program = (
        "import ctypes\n"
        "from vllm_mm_ext.media.decode.decoders import nvdec_device\n"
        "nvdec_device.expendable = True\n"
        "with nvdec_device.watched(60): pass\n"
        "with nvdec_device.watched(0.1): ctypes.PyDLL(None).sleep(30)\n"  # Holds Python's lock.
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=20)
    assert (done.returncode, b"Timeout" in done.stderr) == (1, True)


def test_without_a_seat_no_gpu_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(nvdec_device, "has_seat", lambda: False)
    monkeypatch.setattr(nvdec_device, "gpu", lambda: pytest.fail("looked for"))
    decoder = nvdec()
    _, done = decode(decoder, clip(tmp_path, "h264"), [0])
    assert (decoder.name, decoder.note, done) == ("pyav", "", [0])


def test_each_failure_lets_the_gpu_rest_for_longer_and_a_success_counts_again(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(nvdec_device.time, "monotonic", lambda: now[0])
    gpu = fake_gpu()
    rests = []
    for _ in range(12):
        gpu.failed()
        rests.append(gpu._rest_until - now[0])
        now[0] = gpu._rest_until
        assert not gpu.resting
    assert rests == sorted(rests)
    assert (rests[0], rests[-1]) == (2.0, 300.0)
    gpu.succeeded()
    gpu.failed()
    assert gpu._rest_until - now[0] == 2.0


# --- what goes to the GPU -------------------------------------------------------------------------


def test_work_counts_the_pictures_that_must_be_decoded_not_those_that_are_wanted(video):
    assert work(regular_table(100, 10), np.array([9, 19]), video) == 20.0
    assert work(regular_table(100, 10), np.arange(0, 100, 10), video) == 10.0
    assert work(regular_table(100, 100), np.array([99]), video) == 100.0


@given(st.sampled_from(["h264", "hevc", "vp9", "av1", "mpeg4"]), st.floats(0, 1e9))
def test_nothing_is_worth_a_gpu_before_it_was_measured(codec, megapixels):
    assert not worth_it(gpu_rules(DecodeConfig())[0], codec, megapixels)


@given(st.floats(0.1, 1e6), st.floats(0, 1e7))
def test_a_file_is_worth_a_gpu_from_the_measured_work_of_its_codec_on(least, megapixels):
    rules = GpuRules(from_megapixels=(("hevc", least),))
    assert worth_it(rules, "hevc", megapixels) == (megapixels >= least)
    assert not worth_it(rules, "h264", megapixels)


@pytest.mark.usefixtures("emulated")
def test_auto_gives_a_gpu_what_is_worth_it_and_no_other_file(tmp_path):
    path = clip(tmp_path, "h264")  # 320x180, 75 pictures in GOPs of 15.
    for rows, name in ([0, 15], "pyav"), ([14, 29], "nvdec"):
        rules = GpuRules(from_megapixels=(("h264", 30 * 320 * 180 / 1e6),))
        decoder = get_decoder("auto", max_pixels=LIMITS.max_pixels, gpu=rules)
        decode(decoder, path, rows)
        assert decoder.name == name


@given(st.integers(16, 8192), st.integers(16, 8192), st.integers(0, 1 << 34), st.integers(0, 8))
def test_decoders_of_a_file_stay_within_gpu_memory_and_engines(video, width, height, room, engines):
    video = replace(video, width=width, height=height)
    lanes = lanes_for(replace(H264, engines=engines), video, room)
    assert 0 <= lanes <= max(1, engines)
    assert lanes * width * height * 1.5 * 32 <= room
    if width * height > H264.max_pixels or max(width, height) > 4096:
        assert lanes == 0


def test_formats_that_the_gpu_cannot_decode_stay_on_the_cpu(video):
    gpu = fake_gpu(H264, replace(H264, codec="hevc", bits=10))
    for codec, pixel_format, able in [
        ("h264", "yuv420p", True),
        ("h264", "yuvj420p", True),
        ("h264", "", False),
        ("h264", "yuv420p10le", False),
        ("h264", "yuv422p", False),
        ("hevc", "yuv420p10le", True),
        ("hevc", "yuva420p", False),
        ("hevc", "gray", False),
        ("h264", "gbrp", False),
        ("mpeg4", "yuv420p", False),
    ]:
        stream = replace(video, codec=codec, pixel_format=pixel_format)
        assert (ability_for(gpu, stream) is not None) == able, (codec, pixel_format)
    assert lanes_for(None, video, 1 << 40) == 0


# --- workers and devices --------------------------------------------------------------------------


def test_devices_are_those_that_cuda_would_see():
    for named, devices in {
        "0": ("0",),
        "2,0": ("2", "0"),
        "GPU-8f3c, MIG-11": ("GPU-8f3c", "MIG-11"),
        "1,1": ("1",),
        "0,-1,2": ("0",),
        "": (),
        "-1": (),
    }.items():
        assert visible_devices({"CUDA_VISIBLE_DEVICES": named}) == devices
    assert visible_devices({})


@given(st.integers(1, 4), st.integers(1, 3), st.lists(st.integers(0, 9), max_size=40))
def test_seats_are_spread_evenly_and_never_more_than_there_are(gpus, per_gpu, moves):
    names = tuple(map(str, range(gpus)))
    seats, held = GpuSeats(names, per_gpu), []
    for move in moves:
        if move < 6:
            seat = seats.take()
            assert (seat is None) == (len(held) == gpus * per_gpu)
            taken = {name: sum(one.device == name for one in held) for name in names}
            if seat is not None:
                assert taken[seat.device] == min(taken.values())
                held.append(seat)
        elif held:
            seat = held.pop(move % len(held))
            seat.release()
            seat.release()


def test_a_worker_sees_its_own_gpu_alone_and_no_other_worker_sees_any():
    server = {"CUDA_VISIBLE_DEVICES": "0,1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "HOME": "/"}
    seated = worker_environment(server, "1")
    assert (seated["CUDA_VISIBLE_DEVICES"], seated["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")
    assert not {name for name in worker_environment(server) if name.startswith("CUDA")}


def test_the_configuration_opens_seats_only_where_a_job_may_use_a_gpu():
    assert gpu_rules(DecodeConfig())[1] == 0
    assert gpu_rules(DecodeConfig(backend="pyav"))[1] == 0
    rules, seats = gpu_rules(DecodeConfig(backend="nvdec", nvdec={"sessions": 3, "memory_mb": 64}))
    assert (rules, seats) == (GpuRules(64 << 20), 3)
    measured = DecodeConfig(nvdec={"from_megapixels": {"h264": 900}})
    assert gpu_rules(measured) == (GpuRules(from_megapixels=(("h264", 900.0),)), 2)


@NO_GPU
async def test_workers_without_a_driver_serve_all_videos_with_one_warning(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    path = clip(tmp_path, "h264")
    request = DecodeRequest(sampling=SamplingSpec(max_frames=4), decoder="nvdec", limits=LIMITS)
    pool = DecodePool(workers=1, threads=1, gpu_sessions=1)
    try:
        with open(path, "rb") as file:
            for _ in range(2):
                result = await pool.run(file.fileno(), request)
                assert (result.decoder, len(result.frames)) == ("pyav", 4)
        assert pool.stats() | {"on_gpu": 0, "gpu_fallbacks": 2, "started": 1} == pool.stats()
    finally:
        pool.close()
    (warning,) = [record for record in caplog.records if record.name == "vllm.mm_ext"]
    assert "no NVIDIA driver" in warning.getMessage()


async def test_a_job_whose_worker_dies_on_the_gpu_is_done_without_one(monkeypatch):
    asked = []

    class Dying(FakeWorker):
        def talk(self, sock: socket.socket, request: DecodeRequest) -> None:
            asked.append(request.decoder)
            if request.may_use_gpu:
                self.kill()
            else:
                wire.send(sock, wire.Broken("served"))

    monkeypatch.setattr(pool_module, "WorkerProcess", Dying)
    pool = DecodePool(workers=1, threads=1)
    request = DecodeRequest(sampling=SamplingSpec(), decoder="nvdec")
    with open(os.devnull) as media, pytest.raises(InternalMediaError):
        await pool.run(media.fileno(), request)
    pool.close()
    assert asked == ["nvdec", "pyav"]


def test_a_server_whose_gpus_are_hidden_says_so_once(monkeypatch, caplog):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    DecodePool(workers=1, gpu_sessions=2).close()
    (warning,) = caplog.records
    assert "names no GPU" in warning.getMessage()
