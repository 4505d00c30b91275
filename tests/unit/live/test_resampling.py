"""Sound that comes in pieces is resampled as if it had come whole."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.live.resampling import StreamResampler
from vllm_mm_ext.media.audio.conversion import convert_rate
from vllm_mm_ext.media.audio.waveforms import resample

Samples = npt.NDArray[np.float32]


def in_pieces(resampler: StreamResampler, samples: Samples, lengths: list[int]) -> Samples:
    """All that comes out for these samples, pushed in pieces of these lengths, over and over."""
    out, position, turn = [], 0, 0
    while position < len(samples):
        piece = samples[position : position + lengths[turn % len(lengths)]]
        out.append(resampler.push(piece))
        position, turn = position + len(piece), turn + 1
    return np.concatenate([*out, resampler.flush()])


def noise(count: int, seed: int = 0) -> Samples:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, count).astype(np.float32)


@settings(max_examples=40)
@given(
    rates=st.sampled_from([(24_000, 16_000), (8_000, 16_000), (24_000, 24_000), (8_000, 24_000)]),
    count=st.integers(0, 6000),
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=8),
)
def test_any_pieces_give_what_the_whole_gives(
    rates: tuple[int, int], count: int, lengths: list[int]
) -> None:
    samples = noise(count)
    resampler = StreamResampler(*rates)
    got = in_pieces(resampler, samples, lengths)
    assert len(got) == resampler.taken == resampler.given == count * rates[1] // rates[0]
    if count >= 100:
        np.testing.assert_array_equal(got, convert_rate(samples, *rates)[: len(got)])


@pytest.mark.parametrize("rate", [24_000, 8_000])
def test_pieces_of_one_sample_leave_no_seams(rate: int) -> None:
    time = np.arange(rate // 4) / rate
    tone = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    got = in_pieces(StreamResampler(rate, 16_000), tone, [1])
    expected = np.sin(2 * np.pi * 440 * np.arange(len(got)) / 16_000)
    np.testing.assert_allclose(got[200:-200], expected[200:-200], atol=1e-3)


@pytest.mark.parametrize("rate", [24_000, 8_000])
def test_speech_sounds_as_the_resampler_of_files_makes_it(rate: int) -> None:
    time = np.arange(rate) / rate
    voice = sum(np.sin(2 * np.pi * f * time) / f for f in range(120, 3400, 120)) * 20
    samples = np.asarray(voice, np.float32)
    got = in_pieces(StreamResampler(rate, 16_000), samples, [480])
    expected = resample(samples, rate)[: len(got)]
    np.testing.assert_allclose(got[200:-200], expected[200:-200], atol=3e-3)


def test_little_is_held_back_however_long_the_stream() -> None:
    for rate in (24_000, 8_000):
        resampler = StreamResampler(rate, 16_000)
        for _ in range(300):
            resampler.push(noise(rate // 50))
            assert 0 <= resampler.taken - resampler.given <= 40


@settings(max_examples=30)
@given(counts=st.lists(st.integers(0, 2000), max_size=20))
def test_flushes_and_drops_do_not_move_the_clock(counts: list[int]) -> None:
    resampler = StreamResampler(24_000, 16_000)
    total = 0
    for turn, count in enumerate(counts):
        resampler.push(noise(count))
        total += count
        if turn % 3 == 2:
            resampler.drop()
        else:
            resampler.flush()
        assert resampler.taken == total * 2 // 3
        assert resampler.given == resampler.taken
