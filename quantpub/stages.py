"""Bounded stages: generators chained so that each runs in a thread of its own, a limited number of bytes ahead; and one
that works on several items at once but hands them on in order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")
PATIENCE = 2.0  # seconds


class _Line(Generic[T]):
    """What one thread has made and the next has not taken: at most `limit` bytes, or one item."""

    def __init__(self, limit: int) -> None:
        self._limit, self._waiting = limit, 0
        self._items: deque[tuple[T, int]] = deque()
        self._state = threading.Condition()
        self._closed = self._stopped = False
        self.failure: BaseException | None = None

    def put(self, item: T, size: int) -> bool:
        """Wait for room; False when nobody takes items any more."""
        with self._state:
            self._state.wait_for(lambda: self._stopped or not self._items or self._waiting + size <= self._limit)
            if not self._stopped:
                self._items.append((item, size))
                self._waiting += size
                self._state.notify_all()
            return not self._stopped

    def take(self) -> list[T]:
        """The next item, or nothing when the maker is done."""
        with self._state:
            self._state.wait_for(lambda: bool(self._items) or self._closed)
            if not self._items:
                return []
            item, size = self._items.popleft()
            self._waiting -= size
            self._state.notify_all()
            return [item]

    def close(self) -> None:
        with self._state:
            self._closed = True
            self._state.notify_all()

    def stop(self) -> None:
        with self._state:
            self._stopped = True
            self._state.notify_all()


def background(items: Iterable[T], nbytes: Callable[[T], int], limit: int) -> Generator[T, None, None]:
    """Iterate `items` in a thread that may be at most `limit` bytes (or one item) ahead of the caller.

    An exception there is raised here, in its place. Leaving the loop early stops the thread before its next item; one
    that is waiting for a slow source is not waited for longer than PATIENCE.
    """
    line: _Line[T] = _Line(limit)
    thread = threading.Thread(target=_fill, args=(line, items, nbytes), daemon=True)
    thread.start()
    try:
        while taken := line.take():
            yield taken.pop()
        if line.failure is not None:
            raise line.failure
    finally:
        line.stop()
        thread.join(PATIENCE)


def _fill(line: _Line[T], items: Iterable[T], nbytes: Callable[[T], int]) -> None:
    try:
        for item in items:
            if not line.put(item, nbytes(item)):
                return
    except BaseException as error:
        line.failure = error
    finally:
        line.close()
        _end(items)


def _end(items: Iterable[object]) -> None:
    """Close a generator in the thread that ran it; another thread may not while it runs."""
    if isinstance(items, Generator):
        items.close()


def concurrently(items: Iterable[T], work: Callable[[T], R], workers: int) -> Generator[R, None, None]:
    """`work` on up to `workers` items at a time, results in the order of the items. The first exception ends it."""
    with ThreadPoolExecutor(workers) as pool:
        running: deque[Future[R]] = deque()
        try:
            for item in items:
                running.append(pool.submit(work, item))
                if len(running) > workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
            _end(items)
