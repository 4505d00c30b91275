"""Plans, step by step, what the host tier holds and what the worker copies."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from vllm_mm_ext.policies.encoder_cache.byte_cache import ByteCache


@dataclass(frozen=True)
class HostPlan:
    """The worker's part of one engine step, in this order.

    Attributes:
        clear: Whether to forget all items first.
        drops: Items to forget.
        loads: Items to copy to the device before the model runs.
        saves: Items to copy to the host once they are encoded.
    """

    clear: bool = False
    drops: frozenset[str] = frozenset()
    loads: tuple[str, ...] = ()
    saves: frozenset[str] = frozenset()


@dataclass
class _Save:
    """An item to be saved, and the requests, with its index in each, it may be encoded for."""

    size: int
    cost: float
    needed: list[tuple[str, int]] = field(default_factory=list)
    elsewhere: bool = False


@dataclass
class _Pass:
    """What the current scheduling pass has planned so far."""

    clear: bool = False
    loads: dict[str, None] = field(default_factory=dict)
    saves: dict[str, _Save] = field(default_factory=dict)


class HostTier:
    """Plans copies between device and host: to the host when encoded, to the device when needed.

    The tier evicts nothing during a scheduling pass, so an item that was found in the pass can be
    loaded. Workers execute plans in order, so a plan may load what the plan before it saves.

    Args:
        capacity: Size of the tier in bytes, above 0.
    """

    def __init__(self, capacity: int) -> None:
        self._cache = ByteCache(capacity)
        self._pass = _Pass()

    def __contains__(self, key: object) -> bool:
        """Whether an item can be loaded in this pass."""
        return key in self._cache

    def __len__(self) -> int:
        return len(self._cache)

    @property
    def held(self) -> int:
        """Bytes of all items."""
        return self._cache.held

    @property
    def figures(self) -> dict[str, float]:
        """As of ``ByteCache``; a hit is a load."""
        return self._cache.figures

    def allocated(
        self, key: str, size: int, cost: float, request: str, index: int, *, elsewhere: bool = False
    ) -> None:
        """Plan an item for which the device has space now: a load, or a save once it is there.

        Args:
            key: Names the item.
            size: The item's size in bytes. An item larger than the tier is not saved.
            cost: Work of encoding the item again.
            request: The request that needs it.
            index: The item's place in that request.
            elsewhere: It is not encoded here, but comes from another instance in this step.
        """
        if key in self._cache:
            self._pass.loads[key] = None
            self._cache.use(key, request)
        else:
            save = self._pass.saves.setdefault(key, _Save(size, cost))
            save.needed.append((request, index))
            save.elsewhere |= elsewhere

    def used(self, key: str) -> None:
        """Count a use of an item that a request found in the device tier."""
        self._cache.touch(key)

    def cancel(self, key: str) -> None:
        """Drop what is planned for an item that the device tier gave up in this pass."""
        self._pass.saves.pop(key, None)
        if key in self._pass.loads:
            del self._pass.loads[key]
            self._release(key)

    def plan(self, scheduled: Mapping[str, Collection[int]]) -> HostPlan:
        """End the scheduling pass.

        Args:
            scheduled: By request, the indices of the items that are encoded in this step. A planned
                save of an item that is not among them is dropped.
        """
        now, self._pass = self._pass, _Pass()
        drops: list[str] = []
        saves = []
        for key, save in now.saves.items():
            # A request may have been preempted in the pass that scheduled it, and not another one.
            users = [
                request
                for request, i in save.needed
                if save.elsewhere or i in scheduled.get(request, ())
            ]
            if users and self._cache.fits(save.size):
                drops += self._cache.evict_to_fit(save.size)
                self._cache.add(key, save.size, save.cost, users[0])
                saves.append(key)
        for key in (*now.loads, *saves):
            self._release(key)
        return HostPlan(now.clear, frozenset(drops), tuple(now.loads), frozenset(saves))

    def size(self, key: str) -> int | None:
        """Bytes of an item; None if it is not there."""
        return self._cache.size(key)

    def items(self) -> list[tuple[str, int]]:
        """Key and size of each item."""
        return [(key, size) for key, size, _ in self._cache.items()]

    def forget(self, keys: Iterable[str]) -> None:
        """Forget items that no request uses, between two passes; workers are told by the caller."""
        for key in keys:
            if key in self._cache and not self._cache.users(key):
                self._cache.drop(key)

    def skip(self) -> None:
        """End a pass without a plan for the worker: nothing is encoded, and so nothing is saved.

        The next plan has the rest.
        """
        self._pass.saves.clear()

    def reset(self) -> None:
        """Forget all items; the next plan tells the worker."""
        self._cache.clear()
        self._pass = _Pass(clear=True)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless plans and cache agree; for tests."""
        self._cache.check_integrity()
        assert self._cache.passing is None
        assert all(self._cache.users(key) for key in self._pass.loads)
        assert not any(key in self._cache for key in self._pass.saves)

    def _release(self, key: str) -> None:
        for user in self._cache.users(key):
            self._cache.release(key, user)
