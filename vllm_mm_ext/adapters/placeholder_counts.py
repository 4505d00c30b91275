"""Counts the places of media in a prompt, where nothing keeps a client's text from being one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_mm_ext.adapters.placeholder_wrappers import MODALITIES, placeholders_of
from vllm_mm_ext.errors import MediaError


def check_places(
    renderer: Any,
    text: str,
    mm_data: Mapping[str, Any] | None,
    limit: str = "truncate_prompt_tokens",
) -> None:
    """Refuse a text that does not have exactly one place for each of its media.

    Args:
        renderer: vLLM's renderer.
        text: Of a prompt that is made of texts of several authors.
        mm_data: The prompt's media by modality; None if it has none.
        limit: The field of the request by which the text has been cut, if it has.

    Raises:
        MediaError: It has more places, or fewer.
    """
    for modality, place, found, items in _counted(renderer, text, mm_data):
        if found > items:
            raise MediaError(
                f"a text beside media reads like the place of one ({place!r} for {modality})",
                parameter="text",
                value=place,
            )
        if found < items:
            raise cut_off(limit)


def cut_off(limit: str, value: int | None = None) -> MediaError:
    """The error of a request that has the place of a media item cut off.

    Args:
        limit: The field of the request by which the prompt is cut.
        value: Its value, if it is known.
    """
    return MediaError(
        f"{limit} would cut off the place of a media item in the prompt. Raise it or shorten the "
        "prompt.",
        parameter=limit,
        value=value,
    )


def lacks_places(renderer: Any, prompt: Mapping[str, Any]) -> bool:
    """Whether a prompt has fewer places than media.

    Args:
        renderer: vLLM's renderer.
        prompt: vLLM's ``TokensPrompt``.
    """
    text = renderer.get_tokenizer().decode(prompt["prompt_token_ids"])
    counted = _counted(renderer, text, prompt.get("multi_modal_data"))
    return any(found < items for _, _, found, items in counted)


def _counted(
    renderer: Any, text: str, mm_data: Mapping[str, Any] | None
) -> Iterator[tuple[str, str, int, int]]:
    """For each way to write a place: modality, the place, how many there are, how many media."""
    from vllm.model_executor.model_loader import get_model_cls

    for modality, items in (mm_data or {}).items():
        if modality not in MODALITIES or not isinstance(items, list):
            continue
        write = get_model_cls(renderer.model_config).get_placeholder_str
        # Some models number the places.
        written = Counter(filter(None, (write(modality, n) for n in range(1, len(items) + 1))))
        tokens = placeholders_of(renderer.mm_processor)
        known = [one for one in tokens if any(one in place for place in written)]
        for place, count in (dict.fromkeys(known, len(items)) or written).items():
            yield modality, place, text.count(place), count
