"""Video decoder backends and the choice between them."""

from __future__ import annotations

from vllm_mm_ext.media.decode.decoders.base import Decoder, UnsuitableFileError
from vllm_mm_ext.media.types import AS_PLAYERS, NO_RULES, DecoderName, GpuRules, PictureRules

__all__ = ["Decoder", "UnsuitableFileError", "get_decoder"]


def get_decoder(
    name: DecoderName,
    *,
    max_pixels: int,
    picture: PictureRules = AS_PLAYERS,
    keep_bytes: int = 0,
    gpu: GpuRules = NO_RULES,
    seconds: float = 60.0,
) -> Decoder:
    """Make a decoder.

    Args:
        name: ``pyav``, ``decord``, ``nvdec``, or ``auto`` for what measured best (by
            ``vllm_mm_ext.tools.bench.decoders``, see ``docs/decoders.md``): NVDEC for files that
            are worth it by ``gpu``, else PyAV.
        max_pixels: Most pixels a decoded picture may have.
        picture: How pictures are shown.
        keep_bytes: See ``Decoder``; decord keeps nothing.
        gpu: Limits of NVDEC, and what ``auto`` gives to it.
        seconds: How long the GPU may work on one call before the CPU takes over.
    """
    if name == "decord":
        from vllm_mm_ext.media.decode.decoders.decord_decoder import DecordDecoder

        return DecordDecoder(max_pixels, picture=picture)
    if name == "nvdec" or (name == "auto" and gpu.from_megapixels):
        from vllm_mm_ext.media.decode.decoders.nvdec_decoder import NvdecDecoder

        return NvdecDecoder(
            max_pixels,
            picture=picture,
            keep_bytes=keep_bytes,
            rules=gpu,
            always=name == "nvdec",
            seconds=seconds,
        )
    from vllm_mm_ext.media.decode.decoders.pyav_decoder import PyAVDecoder

    return PyAVDecoder(max_pixels, picture=picture, keep_bytes=keep_bytes)
