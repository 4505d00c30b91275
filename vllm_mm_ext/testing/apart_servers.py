"""Encoder instances and engines on one machine, as real ``vllm serve`` processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_mm_ext.testing.engine_arguments import SCHEDULER, as_flags, sharing
from vllm_mm_ext.testing.server import Server, free_port, serve, together


@dataclass(frozen=True)
class Apart:
    """Servers that share encoder outputs.

    Attributes:
        encoders: Those that encode only.
        engines: Those that answer.
        store: The directory that they share.
    """

    encoders: list[Server]
    engines: list[Server]
    store: Path


@contextlib.contextmanager
def apart(
    checkpoint: Path,
    store: Path,
    *,
    engine_checkpoint: Path | None = None,
    encoders: int = 1,
    engines: int = 1,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    engine_settings: Sequence[Mapping[str, Any]] = (),
    gigabytes: float = 1.0,
    log_dir: Path | None = None,
) -> Iterator[Apart]:
    """Run encoder instances and engines until the block ends; all start at the same time.

    Args:
        checkpoint: The model.
        store: Directory of the shared store.
        engine_checkpoint: The model at another path, for those that answer.
        encoders: How many instances encode only.
        engines: How many answer, and ask the encoders.
        args: More flags for all of them; prompts must fit a step of the encoders.
        env: More environment variables.
        settings: Of ``mm_ext``, for all of them.
        engine_settings: In place of these for the first engine, the second, and so on.
        gigabytes: What the store may hold.
        log_dir: Directory for their logs; default: temporary.

    Raises:
        ServerError: One of them did not come up.
    """
    ports = [free_port() for _ in range(encoders)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    shared = dict(settings or {})

    def asking(engine: int) -> dict[str, Any]:
        own = engine_settings[engine] if engine < len(engine_settings) else shared
        return {**own, "encoder_cache": {**own.get("encoder_cache", {}), "encoders": urls}}

    def side(name: str, role: str, own: Mapping[str, Any], port: int | None) -> Any:
        parts = sharing(role, store, gigabytes) | (SCHEDULER if role == "ec_consumer" else {})
        return serve(
            checkpoint if role == "ec_producer" else engine_checkpoint or checkpoint,
            plugin=True,
            args=[*args, *as_flags(parts)],
            env=env,
            additional_config={"mm_ext": own},
            port=port,
            log=log_dir / f"{name}.log" if log_dir is not None else None,
        )

    sides = [
        *(side(f"encoder{n}", "ec_producer", shared, port) for n, port in enumerate(ports)),
        *(side(f"engine{n}", "ec_consumer", asking(n), None) for n in range(engines)),
    ]
    with together(sides) as up:
        yield Apart(up[:encoders], up[encoders:], store)
