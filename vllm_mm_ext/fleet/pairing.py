"""Whether servers that share encoder outputs make the same of the same media.

A server's *plan* is everything, beside the media and the request, that decides what a segment is
and what its encoder output is: the model, versions, sampling, sizes, segments, reduction. Outputs
of servers with different plans must not be mixed, and would not be found either.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from blake3 import blake3

MANIFEST: Final = "manifest.json"
_LONGEST = 160

Plan = Mapping[str, Any]
"""Values that JSON can hold, by what they decide."""


class PairingError(ValueError):
    """Servers with different plans were told to share encoder outputs."""


def differences(ours: Plan, theirs: Plan) -> list[str]:
    """What differs, each with both values, ours first."""
    return [
        f"{name}: {_shown(ours.get(name))} here, {_shown(theirs.get(name))} there"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]


def digests(plan: Plan) -> dict[str, str]:
    """A short digest of each part of a plan, to compare without telling its values."""
    return {name: _digest(value) for name, value in plan.items()}


def digest(plan: Plan) -> str:
    """A digest of the whole plan."""
    return _digest(dict(plan))


def as_header(plan: Plan) -> str:
    """The digests of a plan's parts in one HTTP header."""
    return ";".join(f"{name}={found}" for name, found in sorted(digests(plan).items()))


def differing_parts(plan: Plan, header: str) -> list[str]:
    """Names of the parts in which a plan differs from the one that a header tells of."""
    ours = digests(plan)
    theirs = dict(part.partition("=")[::2] for part in header.split(";") if part)
    return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))


def join(directory: Path, plan: Plan) -> None:
    """Join the servers that share a directory; the first one writes down its plan.

    Args:
        directory: Made if it is not there.
        plan: This server's.

    Raises:
        PairingError: The directory is that of servers with another plan; says what differs.
        OSError: The directory cannot be written to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / MANIFEST
    if not path.exists():
        part = directory / f"{MANIFEST}.{uuid4().hex}"
        part.write_text(json.dumps(dict(plan), indent=1, sort_keys=True))
        # A link, as it does not replace what another server has written meanwhile.
        with suppress(FileExistsError):
            os.link(part, path)
        part.unlink()
    try:
        theirs = json.loads(path.read_text())
    except ValueError as error:
        raise PairingError(f"{path} is not a plan of this plugin: {error}") from None
    if not isinstance(theirs, dict):
        raise PairingError(f"{path} is not a plan of this plugin")
    # What JSON makes of it: tuples become lists.
    found = differences(json.loads(json.dumps(dict(plan))), theirs)
    if found:
        raise PairingError(
            f"this server does not make the same encoder outputs as those that share {directory}:\n"
            + "\n".join(f"  {line}" for line in found)
            + "\nGive all of them the same settings, or this one another shared_storage_path. If "
            "all have changed, empty the directory while none runs."
        )


def _digest(value: Any) -> str:
    return blake3(json.dumps(value, sort_keys=True).encode()).hexdigest(8)


def _shown(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
