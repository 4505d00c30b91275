"""The waiting queue as vLLM wants it, of which a step sees what it looks at."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from vllm.v1.core.sched.request_queue import RequestQueue

from vllm_mm_ext.policies.scheduler.order import Order, Rank, Ranking

# Waiting requests that every step looks at: of the best and of the first to come. And so many of
# those that were not looked at for longest: they may rank better by now.
LOOKED_AT = 8
LOOKED_AROUND = 4


class ArrangedQueue(RequestQueue):  # type: ignore[misc]
    """Waiting requests, of which vLLM's ``schedule`` sees some, in an order that is given.

    So a step costs the same however many wait. Outside a step all are seen, the best first.

    Args:
        order: Tells the place of a request in the order of coming.
        rank: Tells its rank, as far as it is known when it begins to wait.
    """

    def __init__(self, order: Callable[[Any], Order], rank: Callable[[Any], Rank]) -> None:
        self._order, self._rank = order, rank
        self._ranks: Ranking[Any] = Ranking()
        # Text and media apart: they may pass one another.
        self._came: tuple[Ranking[Any], Ranking[Any]] = (Ranking(), Ranking())
        # In the order in which they were looked at.
        self._seen: dict[Any, None] = {}
        self._shown: deque[Any] | None = None
        self._hidden = 0

    # --- what the scheduler asks ------------------------------------------------------------------

    def first(self, count: int) -> tuple[dict[Any, None], tuple[Any, ...]]:
        """So many of the best, and of the first to come of each kind, text and media.

        Returns:
            These, and of each kind the next to come, if there is one.
        """
        came = [list(ranking.first(count + 1)) for ranking in self._came]
        found = (*self._ranks.first(count), *(one for kind in came for one in kind[:count]))
        return dict.fromkeys(found), tuple(kind[count] for kind in came if len(kind) > count)

    def came(self, count: int) -> list[Any]:
        """So many of the first to come of each kind."""
        return [one for ranking in self._came for one in ranking.first(count)]

    def around(self) -> list[Any]:
        """Those that were not looked at for longest."""
        return list(islice(self._seen, LOOKED_AROUND))

    def looked_at(self, request: Any, rank: Rank) -> None:
        """Note the rank that a waiting request has now."""
        self._ranks.place(request, rank)
        self._seen.pop(request, None)
        self._seen[request] = None

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
                    self._enter(request)

    def __contains__(self, request: object) -> bool:
        return request in self._ranks

    def _enter(self, request: Any) -> None:
        self._came[bool(request.mm_features)].place(request, self._order(request))
        self.looked_at(request, self._rank(request))

    def _leave(self, request: Any) -> None:
        if request in self._ranks:
            self._ranks.drop(request)
            self._came[bool(request.mm_features)].drop(request)
            del self._seen[request]

    # --- what vLLM asks ---------------------------------------------------------------------------

    def add_request(self, request: Any) -> None:
        """A request has come."""
        if self._shown is None:
            self._enter(request)
        else:
            self._shown.append(request)

    def prepend_request(self, request: Any) -> None:
        """A request comes back."""
        if self._shown is None:
            self._enter(request)
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
        if self._shown is not None:
            return self._shown.popleft()
        request = self.peek_request()
        self._leave(request)
        return request

    def remove_request(self, request: Any) -> None:
        """Take a request out."""
        self.remove_requests((request,))

    def remove_requests(self, requests: Iterable[Any]) -> None:
        """Take those out that are here."""
        for request in requests:
            if self._shown is None:
                self._leave(request)
            elif request in self._shown:
                self._shown.remove(request)

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
