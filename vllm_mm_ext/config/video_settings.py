"""Settings of segments and of token reduction: ``mm_ext.segments``, ``mm_ext.compression``."""

from __future__ import annotations

from pydantic import Field

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.config.section import Section


class SegmentsConfig(Section):
    """How videos are cut into segments, each an mm item that is encoded and cached on its own."""

    tokens: int = Field(
        1024,
        ge=0,
        le=1 << 20,
        description="Tokens a segment should not exceed after reduction. One temporal patch of "
        "frames, or as many as merge, is always together. 0: a video is one segment.",
    )


class CompressionConfig(Section):
    """Token reduction, and how much the encoder does at once."""

    reduction: Reduction = Field(
        NO_REDUCTION,
        description="How the tokens of videos are made fewer unless a request says otherwise; if "
        "not set, as the checkpoint says, if it does.",
    )
    encoder_max_patches: int = Field(
        16384,
        ge=0,
        le=1 << 24,
        description="Patches per forward of the vision encoder, which bounds its transient memory; "
        "one image, or one temporal patch of frames, is never divided. 0: no bound.",
    )

    def default_reduction(self, of_model: Reduction | None) -> Reduction:
        """The reduction of a request that names none.

        Args:
            of_model: What the served checkpoint declares, if it does; a setting outranks it.
        """
        given = "reduction" in self.model_fields_set
        return self.reduction if given or of_model is None else of_model
