"""Video decoder backends and the choice between them."""

from __future__ import annotations

from vllm_mm_ext.media.decode.decoders.base import Decoder, UnsuitableFileError
from vllm_mm_ext.media.types import DecoderName

__all__ = ["Decoder", "UnsuitableFileError", "get_decoder"]


def get_decoder(name: DecoderName, *, max_pixels: int, keep_bytes: int = 0) -> Decoder:
    """Make a decoder.

    Args:
        name: ``pyav``, ``decord``, or ``auto`` for PyAV, which is the faster backend and exact for
            more files (measured by ``vllm_mm_ext.tools.bench.decoders``, see ``docs/decoders.md``).
        max_pixels: Most pixels a decoded picture may have.
        keep_bytes: See ``Decoder``; decord keeps nothing.
    """
    if name == "decord":
        from vllm_mm_ext.media.decode.decoders.decord_decoder import DecordDecoder

        return DecordDecoder(max_pixels)
    from vllm_mm_ext.media.decode.decoders.pyav_decoder import PyAVDecoder

    return PyAVDecoder(max_pixels, keep_bytes)
