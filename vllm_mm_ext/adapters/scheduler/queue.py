"""The waiting queue as vLLM wants it, of which a step sees what it looks at."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from sortedcontainers import SortedDict  # type: ignore[import-untyped]
from vllm.v1.core.sched.request_queue import RequestQueue

from vllm_mm_ext.policies.scheduler.step_plan import Order, Rank

# Waiting requests that every step looks at: of the best, and of text and media that came first.
LOOKED_AT = 8


class Ranking:
    """Requests sorted by rank; placing or dropping one takes O(log n)."""

    def __init__(self) -> None:
        self._by_rank: Any = SortedDict()
        self._ranks: dict[Any, Any] = {}

    def place(self, request: Any, rank: Any) -> None:
        """Put a request, known or new, where it belongs now. No two have the same rank."""
        known = self._ranks.get(request)
        if known == rank:
            return
        if known is not None:
            del self._by_rank[known]
        self._ranks[request] = rank
        self._by_rank[rank] = request

    def drop(self, request: Any) -> None:
        """Take a request out; it must be there."""
        del self._by_rank[self._ranks.pop(request)]

    def first(self, count: int) -> list[Any]:
        """Up to so many from the first on."""
        return list(islice(self._by_rank.values(), count))

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, request: object) -> bool:
        return request in self._ranks

    def __iter__(self) -> Iterator[Any]:
        return iter(self._by_rank.values())


class ArrangedQueue(RequestQueue):  # type: ignore[misc]
    """Waiting requests, of which vLLM's ``schedule`` sees some, in an order that is given.

    So a step costs the same however many wait. Outside a step all are seen, the best first.

    Args:
        order: Tells the place of a request in the order of coming.
        rank: Tells its rank, as far as it is known when it begins to wait.
    """

    def __init__(self, order: Callable[[Any], Order], rank: Callable[[Any], Rank]) -> None:
        self._order, self._rank = order, rank
        self._ranks = Ranking()
        # Text and media apart: they may pass one another.
        self._came = (Ranking(), Ranking())
        self._shown: deque[Any] | None = None
        self._hidden = 0

    # --- what the scheduler asks ------------------------------------------------------------------

    def to_look_at(self) -> tuple[list[Any], list[Any]]:
        """Those that a step looks at, and of text and of media the next to come, if there is one.

        They are the best, and the first to come.
        """
        came = [ranking.first(LOOKED_AT + 1) for ranking in self._came]
        found = dict.fromkeys(self._ranks.first(LOOKED_AT))
        found |= dict.fromkeys(one for kind in came for one in kind[:LOOKED_AT])
        return list(found), [one for kind in came for one in kind[LOOKED_AT:]]

    def looked_at(self, request: Any, rank: Rank) -> None:
        """Note the rank that a waiting request has now."""
        self._ranks.place(request, rank)

    @contextmanager
    def showing(self, requests: Iterable[Any]) -> Iterator[None]:
        """Let vLLM see only these, in this order, and what it adds."""
        shown = list(requests)
        self._hidden = len(self._ranks) - len(shown)
        self._shown = deque(shown)
        try:
            yield
        finally:
            left = dict.fromkeys(self._shown)
            self._shown = None
            for request in shown:
                if request not in left:
                    self._leave(request)
            for request in left:
                if request not in self._ranks:
                    self.add_request(request)

    def _leave(self, request: Any) -> None:
        if request in self._ranks:
            self._ranks.drop(request)
            self._came[bool(request.mm_features)].drop(request)

    # --- what vLLM asks ---------------------------------------------------------------------------

    def add_request(self, request: Any) -> None:
        """A request has come."""
        if self._shown is not None:
            self._shown.append(request)
            return
        self._came[bool(request.mm_features)].place(request, self._order(request))
        self.looked_at(request, self._rank(request))

    def prepend_request(self, request: Any) -> None:
        """A request comes back."""
        if self._shown is None:
            self.add_request(request)
        else:
            self._shown.appendleft(request)

    def prepend_requests(self, requests: Iterable[Any]) -> None:
        """Requests come back, in reverse order."""
        for request in requests:
            self.prepend_request(request)

    def peek_request(self) -> Any:
        """The first one."""
        if not self:
            raise IndexError("peek from an empty queue")
        return next(iter(self))

    def pop_request(self) -> Any:
        """Take the first one out."""
        request = self.peek_request()
        self.remove_request(request)
        return request

    def remove_request(self, request: Any) -> None:
        """Take a request out if it is here."""
        if self._shown is None:
            self._leave(request)
        elif request in self._shown:
            self._shown.remove(request)

    def remove_requests(self, requests: Iterable[Any]) -> None:
        """Take those out that are here."""
        for request in requests:
            self.remove_request(request)

    def __contains__(self, request: object) -> bool:
        return request in self._ranks

    def __bool__(self) -> bool:
        """Whether there is one to take: in a step, of those shown."""
        return bool(self._ranks if self._shown is None else self._shown)

    def __len__(self) -> int:
        """All that wait, those not shown included."""
        if self._shown is None:
            return len(self._ranks)
        return self._hidden + len(self._shown)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ranks if self._shown is None else self._shown)
