"""What the host tier holds and what the worker is told to do about it, step by step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from vllm_mm_ext.policies.encoder_cache.byte_cache import ByteCache


@dataclass(frozen=True)
class HostPlan:
    """Work of one engine step, in this order.

    Attributes:
        clear: Forget everything first.
        drops: Items to forget.
        loads: Items to bring to the device before the model runs.
        saves: Items to copy when they have been encoded.
    """

    clear: bool = False
    drops: frozenset[str] = frozenset()
    loads: tuple[str, ...] = ()
    saves: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Save:
    """An item to be saved, and for whom it may be encoded: request and index."""

    size: int
    cost: float
    needed: list[tuple[str, int]] = field(default_factory=list)


@dataclass
class _Pass:
    """What a scheduling pass has found so far."""

    clear: bool = False
    loads: dict[str, None] = field(default_factory=dict)
    saves: dict[str, _Save] = field(default_factory=dict)


class HostTier:
    """Plans the copies between device and host: written through when encoded, read when needed.

    Nothing is evicted while a pass goes on: what was found here will be there to load. Workers
    execute plans in order, so what one plan saves the next may load.

    Args:
        capacity: Bytes of host memory, above 0.
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

    def allocated(self, key: str, size: int, cost: float, request: str, index: int) -> None:
        """The device has room for an item now: load it, or save it once it is encoded.

        Args:
            key: Names the item.
            size: Its bytes. What is larger than the tier is not saved.
            cost: What encoding it again takes.
            request: The request that needs it.
            index: The item's place in that request.
        """
        if key in self._cache:
            self._pass.loads[key] = None
            self._cache.use(key, request)
        else:
            save = self._pass.saves.setdefault(key, _Save(size, cost))
            save.needed.append((request, index))

    def used(self, key: str) -> None:
        """The device tier had an item: a use that counts here, too."""
        self._cache.touch(key)

    def cancel(self, key: str) -> None:
        """The device tier gave an item up before anything was done about it."""
        if key in self._pass.loads:
            del self._pass.loads[key]
            self._release(key)

    def plan(self, scheduled: Mapping[str, Collection[int]]) -> HostPlan:
        """End the pass.

        Args:
            scheduled: By request, the indices of the items that are encoded in this step; what was
                to be saved and is not among them has been given up.
        """
        now, self._pass = self._pass, _Pass()
        drops: list[str] = []
        saves = []
        for key, save in now.saves.items():
            # A request may have been preempted in the pass that scheduled it, and not another one.
            users = [request for request, i in save.needed if i in scheduled.get(request, ())]
            if users and self._cache.fits(save.size):
                drops += self._cache.evict_to_fit(save.size)
                self._cache.add(key, save.size, save.cost, users[0])
                saves.append(key)
        for key in (*now.loads, *saves):
            self._release(key)
        return HostPlan(now.clear, frozenset(drops), tuple(now.loads), frozenset(saves))

    def skip(self) -> None:
        """End a pass of which the worker is told nothing: nothing is encoded, so nothing saved.

        The rest is in the next plan.
        """
        self._pass.saves.clear()

    def reset(self) -> None:
        """Forget everything; the worker is told with the next plan."""
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
