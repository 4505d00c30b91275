"""Refuses options that this server or the served model does not allow."""

from __future__ import annotations

from vllm_mm_ext.config.options import NO_REDUCTION, RequestOptions
from vllm_mm_ext.config.quality_settings import BoundSettings
from vllm_mm_ext.errors import OptionBoundError
from vllm_mm_ext.policies.quality.videos import Family

_KEY = "mm_ext"


def check_bounds(options: RequestOptions, bounds: BoundSettings) -> None:
    """Refuse options past the server's bounds.

    Args:
        options: What a request asks.
        bounds: The ``bounds`` section.

    Raises:
        OptionBoundError: An option is past its bound; the message names option, value and bound.
    """
    floor, windows = options.floor, options.long_video
    at_most: list[tuple[str, float | None, float]] = [
        ("fps", options.fps, bounds.max_fps),
        ("floor.fps", floor.fps, bounds.max_fps),
        ("long_video.fps", None if windows is None else windows.fps, bounds.max_fps),
        ("min_frames", options.min_frames, bounds.max_frames),
        ("max_frames", options.max_frames, bounds.max_frames),
        ("floor.frames", floor.frames, bounds.max_frames),
        ("resolution", options.resolution, bounds.max_resolution),
        ("floor.resolution", floor.resolution, bounds.max_resolution),
    ]
    if bounds.max_total_tokens:
        at_most.append(("total_tokens", options.total_tokens, bounds.max_total_tokens))
    for key, value, bound in at_most:
        if value is not None and value > bound:
            raise _refusal(key, value, f"this server allows at most {bound}")
    if options.resolution is not None and options.resolution < bounds.min_resolution:
        bound = bounds.min_resolution
        raise _refusal("resolution", options.resolution, f"this server allows at least {bound}")


def check_family(options: RequestOptions, family: Family) -> None:
    """Refuse options that the served model cannot follow.

    Args:
        options: What a request asks.
        family: What can be done to videos of the served model.

    Raises:
        OptionBoundError: There is such an option; the message names it.
    """
    if options.reduction not in (None, NO_REDUCTION) and not family.reducible:
        assert options.reduction is not None
        raise _refusal(
            "reduction",
            options.reduction.key(),
            "the served model, as this server is set up or with these mm_processor_kwargs, allows "
            "no token reductions",
        )
    asked, trained = options.reduction, family.trained
    if asked is not None and trained is not None and not trained.allow(asked):
        raise _refusal(
            "reduction",
            asked.key(),
            f"the served model was trained for {trained}; static merging or pruning needs pool 1, "
            "temporal 1",
        )
    if options.total_tokens is not None and not family.countable:
        raise _refusal(
            "total_tokens",
            options.total_tokens,
            "the served model's video tokens, as this server is set up, cannot be told in advance; "
            "max_frames can be set",
        )


def _refusal(key: str, value: object, text: str) -> OptionBoundError:
    path = f"{_KEY}.{key}"
    return OptionBoundError(f"{path} = {value!r}: {text}", parameter=path, value=value)
