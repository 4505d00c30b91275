"""Video decoder backends and the choice between them."""

from __future__ import annotations

from vllm_mm_ext.media.decode.decoders.base import Decoder, UnsuitableFileError
from vllm_mm_ext.media.types import AS_PLAYERS, DecoderName, PictureRules

__all__ = ["Decoder", "UnsuitableFileError", "get_decoder"]


def get_decoder(
    name: DecoderName,
    *,
    max_pixels: int,
    picture: PictureRules = AS_PLAYERS,
    keep_bytes: int = 0,
) -> Decoder:
    """Make a decoder.

    Args:
        name: ``pyav``, ``decord``, or ``auto`` for PyAV, which is the faster backend and exact for
            more files (measured by ``vllm_mm_ext.tools.bench.decoders``, see ``docs/decoders.md``).
        max_pixels: Most pixels a decoded picture may have.
        picture: How pictures are shown.
        keep_bytes: See ``Decoder``; decord keeps nothing.
    """
    if name == "decord":
        from vllm_mm_ext.media.decode.decoders.decord_decoder import DecordDecoder

        return DecordDecoder(max_pixels, picture=picture)
    from vllm_mm_ext.media.decode.decoders.pyav_decoder import PyAVDecoder

    return PyAVDecoder(max_pixels, picture=picture, keep_bytes=keep_bytes)
