"""The operator's page and the admin API as a feature of the plugin."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.operator_names import OPERATOR_NAMES
from vllm_mm_ext.adapters.vllm_compat import Feature


def _install() -> None:
    from vllm_mm_ext.adapters import route_wrappers
    from vllm_mm_ext.adapters.serving.answers import begin_with_file
    from vllm_mm_ext.adapters.serving.endpoints import MMExtEndpointPlugin
    from vllm_mm_ext.adapters.sight import engine_part

    route_wrappers.before_transcription(begin_with_file)
    engine_part.install()
    MMExtEndpointPlugin.operator_page = True


SIGHT_FEATURE = Feature(
    "operator page",
    "the server has no page /mm_ext/ and no admin API",
    OPERATOR_NAMES,
    _install,
)
