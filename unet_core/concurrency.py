"""Work on threads, ahead of its use, with results in order."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

READ_THREADS = 16  # hides the latency of object storage


def map_in_order(
    read: Callable[[ItemT], ResultT], items: Iterable[ItemT], threads: int = READ_THREADS
) -> Iterator[ResultT]:
    """Read items on threads, a few ahead; yields results in order, and may be stopped early."""
    pool = ThreadPoolExecutor(threads)
    line: deque[Future[ResultT]] = deque()
    try:
        for item in items:
            line.append(pool.submit(read, item))
            if len(line) > 2 * threads:
                yield line.popleft().result()
        while line:
            yield line.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error the rest is not awaited


class Prefetch(Generic[ItemT, ResultT]):
    """Draws items from an iterator on a thread of its own, works on them in a pool, and yields the
    results in order.

    Draws no item while more than ``ahead`` are queued, or while the weight of items and results
    that are held, with an estimate for those under way, exceeds ``budget``; the estimate is the
    heaviest result so far, and one item is always allowed. As a context manager it draws items
    while it is entered. Errors of the iterator or of the work are raised where results are used.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        work: Callable[[ItemT], ResultT],
        items: Iterator[ItemT],
        ahead: int,
        weigh: Callable[[ResultT], int] = lambda _: 0,
        budget: int = 0,
        weigh_item: Callable[[ItemT], int] = lambda _: 0,
    ) -> None:
        self._pool, self._work, self._items = pool, work, items
        self._weigh, self._weigh_item, self._budget = weigh, weigh_item, budget
        self._ahead = ahead
        self._line: deque[Future[ResultT] | BaseException | None] = deque()
        self._waiting = self._under_way = 0
        self._heaviest: int | None = None
        self._is_left = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="reader", daemon=True)

    def __enter__(self) -> "Prefetch[ItemT, ResultT]":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_left = True
            self._changed.notify_all()
        self._thread.join()

    def __iter__(self) -> Iterator[ResultT]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line)
                item = self._line.popleft()
                self._changed.notify_all()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            result = item.result()
            with self._changed:
                self._waiting -= self._weigh(result)
                self._changed.notify_all()
            yield result

    def _read(self) -> None:
        try:
            for item in self._items:
                if not self._take_room(self._weigh_item(item)):
                    return
                self._put(self._pool.submit(self._worked, item))
            self._put(None)
        except BaseException as error:  # raised again where the results are used
            self._put(error)

    def _worked(self, item: ItemT) -> ResultT:
        weight = 0
        try:
            result = self._work(item)
            weight = self._weigh(result)
            return result
        finally:
            with self._changed:
                self._waiting += weight - self._weigh_item(item)
                self._under_way -= 1
                self._heaviest = max(self._heaviest or 0, weight)
                self._changed.notify_all()

    def _take_room(self, weight: int) -> bool:
        """Wait until an item, and a result as heavy as the heaviest yet, fits or is alone; False if
        the context was left.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_left or self._has_room(weight))
            self._under_way += 1
            self._waiting += weight
            return not self._is_left

    def _has_room(self, weight: int) -> bool:
        if len(self._line) > self._ahead:
            return False
        if not self._under_way and not self._waiting:
            return True
        return self._heaviest is not None and (
            self._waiting + weight + (self._under_way + 1) * self._heaviest <= self._budget
        )

    def _put(self, item: Future[ResultT] | BaseException | None) -> None:
        with self._changed:
            self._line.append(item)
            self._changed.notify_all()
