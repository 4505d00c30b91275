"""What the block pool may keep, and why it gives blocks up."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class Limits:
    """What the operator lets the pool keep of media, and what blocks cost.

    Attributes:
        quota: Blocks of media that no request uses, at most.
        floor: Blocks that are to be free and not of media. Below it the pool gives media up.
        min_items: Idle pieces of media that quota and floor leave.
        hidden_size: Hidden size of the language model, which recomputation costs depend on.
        block_bytes: Size of a KV block in bytes.
    """

    quota: int
    floor: int
    min_items: int
    hidden_size: int
    block_bytes: int


class Reason(StrEnum):
    """Why the pool gave blocks up."""

    quota = "quota"
    pressure = "pressure"
    ranking = "ranking"
    asked = "asked"
    """A client ended a session, or vLLM evicts or moves a block."""
    before = "before"
    """What is before them was given up."""
