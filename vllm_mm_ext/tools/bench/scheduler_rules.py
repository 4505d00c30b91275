"""The rules of the plugin's scheduler that ``scheduler --ablate`` switches off, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest import mock

from vllm_mm_ext.policies.scheduler import step_plan


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    with mock.patch.object(owner, name, value):
        yield


RULES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "a fifth for prompts": partial(_set, step_plan, "LEAST_SHARE", 0.01),
    "more when aged": partial(_set, step_plan, "LEAST_SHARE_AGED", 0.01),
    "half for text": partial(_set, step_plan, "TEXT_SHARE", 0.0),
    "two blocks at least": partial(_set, step_plan, "LEAST_PREFILL_TOKENS", 1),
    "running before failed": partial(_set, step_plan, "_behind_running", list),
}
