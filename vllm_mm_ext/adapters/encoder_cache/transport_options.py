"""What ``--ec-transfer-config`` says of the transport of encoder outputs between instances."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TRANSPORT: Final = "transport"
SHARED_STORE: Final = "ECExampleConnector"
CPU: Final = "ECCPUConnector"
MOONCAKE: Final = "ECMooncakeConnector"
TRANSPORTS: Final = (SHARED_STORE, CPU, MOONCAKE)

# Where a request names what an encoder was asked for: a key of vLLM's ``ec_transfer_params``.
JOB: Final = "mm_ext_job"

# Ends the names of items that are not shared, as they do not tell what is in the item.
OWN: Final = "-own"

_PATH, _GB = "shared_storage_path", "shared_storage_gb"
_DEFAULT_GB: Final = 16.0
GIB: Final = 1 << 30


class TransportError(ValueError):
    """Encoder outputs cannot be shared between instances as they are configured."""


def transport_of(transfer: Any) -> str | None:
    """The transport that an ``ECTransferConfig`` names; None without one.

    Raises:
        TransportError: There is no such transport, or one of its settings is wrong.
    """
    extra: Mapping[str, Any] = transfer.ec_connector_extra_config
    if TRANSPORT not in extra:
        return None
    name = extra[TRANSPORT]
    if name not in TRANSPORTS:
        raise TransportError(
            f"ec_connector_extra_config.{TRANSPORT} must be one of {', '.join(TRANSPORTS)}, "
            f"got {name!r}"
        )
    if name == SHARED_STORE:
        unknown = sorted(set(extra) - {TRANSPORT, _PATH, _GB})
        if unknown:
            raise TransportError(
                f"ec_connector_extra_config has unknown keys: {', '.join(unknown)}; with "
                f"{SHARED_STORE} it may have {TRANSPORT}, {_PATH} and {_GB}"
            )
        path = extra.get(_PATH)
        if not isinstance(path, str) or not Path(path).is_absolute():
            raise TransportError(
                f"ec_connector_extra_config.{_PATH} must be the absolute path of a directory that "
                f"all instances share, got {path!r}"
            )
        size = extra.get(_GB, _DEFAULT_GB)
        if isinstance(size, bool) or not isinstance(size, (int, float)) or not size > 0:
            raise TransportError(
                f"ec_connector_extra_config.{_GB} must be a number above 0, got {size!r}"
            )
    return str(name)


def is_shared(identifier: str) -> bool:
    """Whether an item's output may go to, or come from, other instances."""
    return not identifier.endswith(OWN)


def shared_directory(vllm_config: VllmConfig) -> Path:
    """The directory of the shared store."""
    return Path(vllm_config.ec_transfer_config.ec_connector_extra_config[_PATH])


def store_bytes(vllm_config: VllmConfig) -> int:
    """Bytes that the shared store may hold."""
    extra = vllm_config.ec_transfer_config.ec_connector_extra_config
    return max(1, int(float(extra.get(_GB, _DEFAULT_GB)) * GIB))
