"""The samples of the Realtime protocol's audio formats."""

import av
import numpy as np
import pytest

from vllm_mm_ext.live.audio_format import AudioFormat


@pytest.mark.parametrize(
    ("audio_format", "codec"),
    [(AudioFormat.MU_LAW, "pcm_mulaw"), (AudioFormat.A_LAW, "pcm_alaw")],
)
def test_every_byte_of_g711_is_the_sample_that_ffmpeg_decodes(
    audio_format: AudioFormat, codec: str
) -> None:
    audio = bytes(range(256))
    decoder = av.CodecContext.create(codec, "r")
    decoder.sample_rate, decoder.layout = 8000, "mono"  # type: ignore[attr-defined]
    (frame,) = decoder.decode(av.Packet(audio))  # type: ignore[attr-defined]
    expected = frame.to_ndarray().reshape(-1).astype(np.float32) / 2**15
    np.testing.assert_array_equal(audio_format.samples(audio), expected)
    assert audio_format.rate == 8000


def test_pcm16_is_little_endian_within_one() -> None:
    samples = AudioFormat.PCM16.samples(np.array([-(2**15), 0, 2**15 - 1], "<i2").tobytes())
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, [-1.0, 0.0, (2**15 - 1) / 2**15])
    assert AudioFormat.PCM16.rate == 24_000


def test_bytes_that_end_within_a_sample_are_an_error() -> None:
    with pytest.raises(ValueError, match="multiple"):
        AudioFormat.PCM16.samples(b"abc")
