"""vLLM's bounds on the media of one request, charged with what the plugin delivers (vLLM 0.33).

vLLM gives the connectors of a request two budgets: the bytes that it downloads (256 MB unless
``VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB`` says otherwise) and the bytes of what is decoded
(``VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES``). Caches save downloads, so both are charged when media are
delivered: whether a request is refused depends on the request alone. Planning looks at videos
through a connector without budgets; it adds up their files by itself, so that what will be refused
is not decoded. The parts of a long video are delivered to requests of the plugin's own, which
download nothing: the client's request is charged when its videos are surveyed. vLLM 0.32 has no
such budgets.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from vllm import envs

from vllm_mm_ext.adapters.names.names_check import IncompatibleError
from vllm_mm_ext.adapters.vllm_compat import logger
from vllm_mm_ext.config.media_settings import DecodeConfig
from vllm_mm_ext.media.fetch.blob import Blob
from vllm_mm_ext.media.fetch.byte_gate import Claim, MediaBudget
from vllm_mm_ext.media.fetch.fetcher import MediaRef
from vllm_mm_ext.media.fetch.source import Fetched
from vllm_mm_ext.media.frontend import AudioResult, VideoResult
from vllm_mm_ext.media.payload import Waveform
from vllm_mm_ext.media.use_media import MediaUse
from vllm_mm_ext.request.context import RequestContext

Delivered = MediaUse[VideoResult] | MediaUse[AudioResult]


def warn_of_decode_bound(decode: DecodeConfig) -> None:
    """Say at start-up that a video may not be as large as the operator allows, if vLLM says so.

    Args:
        decode: Settings of decode workers.
    """
    # vLLM 0.32 has no such bound; 0 is none.
    bound = getattr(envs, "VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES", 0)
    asked = decode.max_output_mb if "max_output_mb" in decode.model_fields_set else 0
    if 0 < bound < asked << 20:
        logger.warning(
            "mm_ext: mm_ext.media.decode.max_output_mb allows %d MiB of frames of a video, but "
            "vLLM refuses requests whose media take more than "
            "VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES=%d bytes. Set the variable to %d or more.",
            *(asked, bound, asked << 20),
        )


def download_budget() -> Any:
    """A fresh budget for the downloads of one request; None if this vLLM has none."""
    from vllm import connections

    budget = getattr(connections, "MediaRequestDownloadBudget", None)
    return None if budget is None else budget()


def charge_download(downloads: Any, context: RequestContext, url: str, size: int) -> None:
    """Charge a download budget with a file, if there is a budget and the file is downloaded.

    Args:
        downloads: vLLM's budget, or None.
        context: Of the request.
        url: Of the file, as the request spells it.
        size: Bytes of the file.

    Raises:
        VLLMUnprocessableEntityError: The request downloads too much (a 422, as with stock vLLM).
    """
    if downloads is None or url[:4].lower() != "http" or url in context.contents:
        return
    from vllm.connections import MediaRequestDownloadSizeExceededError
    from vllm.multimodal.media.connector import _wrap_media_fetch_error

    try:
        downloads.charge(size)
    except MediaRequestDownloadSizeExceededError as error:
        raise _wrap_media_fetch_error(url, error) from error


def charge_request(connector: Any, context: RequestContext, url: str, used: Delivered) -> None:
    """Charge the budgets of a connector's request. May wait for other threads' decoding.

    Args:
        connector: The ``MediaConnector`` that delivers.
        context: Of the request.
        url: Of the media, as the request spells it.
        used: What is delivered, and the media that it was made of.

    Raises:
        VLLMUnprocessableEntityError: The request downloads too much (a 422, as with stock vLLM).
        ValueError: The request's decoded media take too much memory (a 400, as with stock vLLM).
    """
    downloads = getattr(connector, "download_budget", None)
    charge_download(downloads, context, url, used.content.size)
    decoded = getattr(connector, "decoded_budget", None)
    if decoded is not None:
        decoded.charge(_decoded_bytes(used.result))


async def charge_request_async(
    connector: Any, context: RequestContext, url: str, used: Delivered
) -> None:
    """``charge_request`` for an event loop, which must not wait."""
    budgets = ("download_budget", "decoded_budget")
    if any(getattr(connector, budget, None) is not None for budget in budgets):
        await asyncio.to_thread(charge_request, connector, context, url, used)


def check_budgets() -> None:
    """Deliver a sound through a connector with budgets of its own, if this vLLM has them.

    Raises:
        IncompatibleError: They were not charged.
    """
    from vllm.multimodal import media

    if not hasattr(media, "MediaDecodedBudget"):
        return
    connector = media.MEDIA_CONNECTOR_REGISTRY.load(
        "mm_ext",
        decoded_budget=media.MediaDecodedBudget(),
        download_budget=download_budget(),
    )
    sound = Waveform(np.zeros(4, np.float32), digest="", rate=1)
    claim = MediaBudget(1).claim()
    content = MediaRef(Fetched("", 3, None), _unread, claim)
    used = MediaUse(content, AudioResult(sound, {}, False), 0, 0)
    charge_request(connector, RequestContext(), "http://", used)
    if (connector.decoded_budget.used, connector.download_budget.used) != (sound.nbytes, 3):
        raise IncompatibleError("a request's media budgets do not add up what is charged")


async def _unread(_: Claim) -> Blob:
    raise AssertionError("nothing reads the media of a check")


def _decoded_bytes(result: VideoResult | AudioResult) -> int:
    if isinstance(result, AudioResult):
        return int(result.waveform.nbytes)
    sound = result.frames.audio
    return int(result.frames.nbytes) + (0 if sound is None else int(sound.nbytes))
