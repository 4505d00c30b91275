"""The waiting queue as vLLM wants it, of which a step sees what it looks at."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, NamedTuple

from vllm.v1.core.sched.request_queue import RequestQueue

from vllm_mm_ext.policies.scheduler.order import Order, Rank
from vllm_mm_ext.policies.scheduler.ranking import Ranking

# Of a longer queue than twice this, so many of the best and of the first to come are looked at in
# each step.
LOOKED_AT = 64
# And so many of those never looked at, or not for longest.
LOOKED_AROUND = 32


class SortKeys(NamedTuple):
    """By what a waiting request is sorted; the lowest goes first.

    Attributes:
        rank: Among all waiting requests, as far as it was last looked at.
        order: Among all waiting requests by their coming.
    """

    rank: Rank
    order: Order


class ArrangedQueue(RequestQueue):  # type: ignore[misc]
    """Waiting requests, of which vLLM's ``schedule`` sees some, in an order that is given.

    So a step costs the same however many wait. Outside a step all are seen, the best first.

    Args:
        sort_keys: Tells the keys of a request that nobody has looked at yet.
    """

    def __init__(self, sort_keys: Callable[[Any], SortKeys]) -> None:
        self._sort_keys = sort_keys
        self._ranks: Ranking[Any] = Ranking()
        self._came: Ranking[Any] = Ranking()
        self._new: dict[Any, None] = {}
        # Those that were looked at, the last one last.
        self._seen: dict[Any, None] = {}
        self._shown: deque[Any] | None = None
        self._hidden = 0

    # --- what the scheduler asks ------------------------------------------------------------------

    def candidates(self) -> list[Any]:
        """Requests to look at now: all of a short queue.

        Of a long one the best so far, as their turn may come; the first to come, as none may pass
        those that wait for too long; new ones, or others that may rank better than when they were
        looked at.
        """
        if len(self) <= 2 * LOOKED_AT:
            return list(self._ranks)
        first = (*self._ranks.first(LOOKED_AT), *self._came.first(LOOKED_AT))
        around = islice(chain(self._new, self._seen), LOOKED_AROUND)
        return list(dict.fromkeys((*first, *around)))

    def looked_at(self, request: Any, sort_keys: SortKeys) -> None:
        """Note the sort keys that a waiting request has now."""
        self._ranks.place(request, sort_keys.rank)
        self._came.place(request, sort_keys.order)
        self._new.pop(request, None)
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
        rank, order = self._sort_keys(request)
        self._ranks.place(request, rank)
        self._came.place(request, order)
        self._new[request] = None

    def _leave(self, request: Any) -> None:
        if request in self._ranks:
            self._ranks.drop(request)
            self._came.drop(request)
            self._new.pop(request, None)
            self._seen.pop(request, None)

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
