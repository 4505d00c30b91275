"""Items within a byte budget: items in use stay; of the others the lowest value density goes."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_mm_ext.policies.eviction.cost_aware import CostAware


@dataclass(slots=True)
class _Entry:
    size: int
    last_user: str
    users: set[str] = field(default_factory=set)


class ByteCache:
    """Tells which items are cached, who uses them and which are evicted; it does not hold them.

    An item larger than the budget passes through: it is cached as long as it has users, beside the
    other items, and evicts nothing. There is one such item at a time. So the items take the budget
    and one item at most; more only where ``add`` overdraws.

    Args:
        capacity: The budget in bytes, above 0.

    Attributes:
        hits: Uses of items that were cached already, since the cache was made.
        adds: Items that were cached, since then.
        evictions: Items that were evicted, since then.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be above 0, got {capacity}")
        self.capacity = capacity
        self._entries: dict[str, _Entry] = {}
        self._ranks: CostAware[str] = CostAware()
        self._held = 0
        self._busy = 0
        self._passing: str | None = None
        self.hits = self.adds = self.evictions = 0

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def held(self) -> int:
        """Bytes of all items, except the item that passes through."""
        return self._held

    @property
    def busy(self) -> int:
        """Bytes of the items in use, except the item that passes through."""
        return self._busy

    @property
    def figures(self) -> dict[str, float]:
        """Counts since the cache was made, and what it holds, in bytes and items."""
        return {
            "hits": self.hits,
            "adds": self.adds,
            "evictions": self.evictions,
            "bytes": self._held,
            "capacity": self.capacity,
            "items": len(self._entries),
        }

    @property
    def passing(self) -> str | None:
        """Key of the item that passes through; None if there is none."""
        return self._passing

    def users(self, key: str) -> frozenset[str]:
        """Users of an item; none if the item is not cached."""
        entry = self._entries.get(key)
        return frozenset(entry.users) if entry is not None else frozenset()

    def size(self, key: str) -> int | None:
        """Bytes of an item; None if it is not cached."""
        entry = self._entries.get(key)
        return None if entry is None else entry.size

    def items(self) -> list[tuple[str, int, bool]]:
        """Key and size of each item, and whether somebody uses it."""
        return [(key, entry.size, bool(entry.users)) for key, entry in self._entries.items()]

    def fits(self, size: int) -> bool:
        """Whether so many bytes fit once all items that are not in use are evicted."""
        return self._busy + size <= self.capacity

    def evict_to_fit(self, size: int) -> list[str]:
        """Evict until so many bytes are free or all left are in use; returns the evicted keys."""
        gone: list[str] = []
        while self._held + size > self.capacity and self._held > self._busy:
            victim = self._ranks.victim(lambda key: not self._entries[key].users)
            assert victim is not None
            self._held -= self._entries.pop(victim).size
            self._ranks.evict(victim)
            self.evictions += 1
            gone.append(victim)
        return gone

    def add(self, key: str, size: int, cost: float, user: str, *, overdraw: bool = False) -> None:
        """Cache an item for a user. ``evict_to_fit`` comes first.

        Args:
            key: Names the item.
            size: The item's size in bytes.
            cost: Work of encoding the item again.
            user: Who needs the item.
            overdraw: Whether to cache the item even beyond the budget.

        Raises:
            ValueError: The item is cached already, or does not fit.
        """
        if key in self._entries:
            raise ValueError(f"{key} is cached already")
        if size > self.capacity:
            if self._passing is None:
                self._passing = key
            elif not overdraw:
                raise ValueError(f"{key} has to wait for {self._passing} to pass through")
        elif self._held + size > self.capacity and not overdraw:
            raise ValueError(f"no room for the {size} bytes of {key}")
        self._entries[key] = _Entry(size, user, {user})
        self.adds += 1
        if key != self._passing:
            self._held += size
            self._busy += size
            self._ranks.admit(key, size, cost)

    def use(self, key: str, user: str) -> bool:
        """Note that a user needs a cached item; returns whether this counts as a new use."""
        entry = self._entries[key]
        if user in entry.users:
            return False
        if not entry.users:
            self._busy += entry.size
        entry.users.add(user)
        # vLLM checks a waiting request's items in every step; that is one use of an item.
        new = user != entry.last_user
        self.hits += new
        entry.last_user = user
        if new and key in self._ranks:
            self._ranks.hit(key)
        return new

    def release(self, key: str, user: str) -> list[str]:
        """Note that a user no longer needs an item; returns the keys evicted because of that."""
        entry = self._entries.get(key)
        if entry is None or user not in entry.users:
            return []
        entry.users.remove(user)
        if entry.users:
            return []
        if key == self._passing:
            self._passing = None
            del self._entries[key]
            return [key]
        self._busy -= entry.size
        # Bytes beyond the budget are given back as soon as possible.
        return self.evict_to_fit(0)

    def drop(self, key: str) -> None:
        """Forget an item, in use or not, as if it had never been cached."""
        entry = self._entries.pop(key)
        if key == self._passing:
            self._passing = None
            return
        self._held -= entry.size
        if entry.users:
            self._busy -= entry.size
        self._ranks.forget(key)

    def touch(self, key: str) -> None:
        """Count a use of an item in another tier; ignored if the item is not cached here."""
        if key in self._ranks:
            self._ranks.hit(key)

    def clear(self) -> None:
        """Forget all items."""
        self._entries.clear()
        self._ranks.clear()
        self._held = 0
        self._busy = 0
        self._passing = None

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless entries, ranks and counters agree; for tests."""
        own = {key: entry for key, entry in self._entries.items() if key != self._passing}
        assert self._held == sum(entry.size for entry in own.values())
        assert self._busy == sum(entry.size for entry in own.values() if entry.users)
        assert self._held <= max(self.capacity, self._busy)
        assert len(self._ranks) == len(own)
        assert all(key in self._ranks for key in own)
        if self._passing is not None:
            assert self._entries[self._passing].users
            assert self._entries[self._passing].size > self.capacity
        self._ranks.check_integrity()
