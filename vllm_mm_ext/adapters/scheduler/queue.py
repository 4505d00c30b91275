"""The waiting queue as vLLM wants it, of which a step sees what it looks at."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

from sortedcontainers import SortedDict  # type: ignore[import-untyped]
from vllm.v1.core.sched.request_queue import RequestQueue

from vllm_mm_ext.policies.scheduler.step_plan import Order, Rank

# Waiting requests that every step looks at: of the best, of text and of media that came first, and
# of those set aside.
LOOKED_AT = 8


class Ranking:
    """Requests sorted by rank; placing or dropping one takes O(log n)."""

    def __init__(self) -> None:
        self._by_rank: Any = SortedDict()
        self._ranks: dict[Any, Any] = {}

    def place(self, request: Any, rank: Any) -> None:
        """Put a request, known or new, where it belongs now; None: nowhere. Ranks differ."""
        if self._ranks.get(request) != rank:
            self.drop(request)
            if rank is not None:
                self._ranks[request] = rank
                self._by_rank[rank] = request

    def drop(self, request: Any) -> None:
        """Take a request out if it is here."""
        if request in self._ranks:
            del self._by_rank[self._ranks.pop(request)]

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
        # Those that cannot get on, in the order in which each was looked at last.
        self._aside, self._looks = Ranking(), count()
        self._rankings = (self._ranks, *self._came, self._aside)
        self._shown: deque[Any] | None = None
        self._hidden = 0

    # --- what the scheduler asks ------------------------------------------------------------------

    def to_look_at(self) -> tuple[list[Any], list[Any]]:
        """Those that a step looks at, and of text and of media the next to come, if there is one.

        They are the best, the first to come, and of those set aside the next in turn.
        """
        firsts = [list(islice(ranking, LOOKED_AT + 1)) for ranking in self._rankings]
        found = dict.fromkeys(one for some in firsts for one in some[:LOOKED_AT])
        return list(found), [one for came in firsts[1:3] for one in came[LOOKED_AT:]]

    def looked_at(self, request: Any, rank: Rank, *, passed: bool = False) -> None:
        """Note the rank that a waiting request has now.

        With one above 1 it is set aside, so that a run of such requests hides nobody.

        Args:
            request: The request.
            rank: Its rank.
            passed: Later ones may pass it meanwhile: it is not of the first to come.
        """
        self._ranks.place(request, rank)
        came = self._came[bool(request.mm_features)]
        came.place(request, None if passed else self._order(request))
        self._aside.place(request, next(self._looks) if rank[0] > 1 else None)

    @contextmanager
    def showing(self, requests: Iterable[Any]) -> Iterator[None]:
        """Let vLLM see only these, in this order, and what it adds."""
        shown = list(requests)
        self._hidden = len(self._ranks) - len(shown)
        self._shown = deque(shown)
        try:
            yield
        finally:
            left, self._shown = dict.fromkeys(self._shown), None
            self.remove_requests(one for one in shown if one not in left)
            for request in left:
                if request not in self._ranks:
                    self.add_request(request)

    # --- what vLLM asks ---------------------------------------------------------------------------

    def add_request(self, request: Any) -> None:
        """A request has come."""
        if self._shown is not None:
            self._shown.append(request)
            return
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
            for ranking in self._rankings:
                ranking.drop(request)
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
