"""One change to vLLM, as the lists of changes have it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """One change to vLLM, in one place or in several for one reason.

    Attributes:
        feature: The feature that makes it.
        targets: What is changed: ``module:attribute.path``. Of a table, all entries that the
            feature changes.
        why: What the plugin could not do without the change.
        until: What vLLM would have to offer for the change to go.
        versions: vLLM releases that need it, as a version specifier.
        later: The change is made to the objects of an engine, when the engine is built or asked,
            and not when the plugin is loaded.
    """

    feature: str
    targets: tuple[str, ...]
    why: str
    until: str
    versions: str = ">=0.32"
    later: bool = False
