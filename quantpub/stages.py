"""Bounded stages: generators chained so that each runs in a thread of its own, a limited number of bytes ahead."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")


def background(items: Iterable[T], nbytes: Callable[[T], int], limit: int) -> Generator[T, None, None]:
    """Iterate `items` in a thread that may be at most `limit` bytes (or one item) ahead of the caller.

    An exception there is raised here, in its place. Leaving the loop early stops the thread before its next item.
    """
    ready: deque[tuple[T, int]] = deque()
    state = threading.Condition()
    waiting, done, stopped = 0, False, False
    failure: BaseException | None = None

    def produce() -> None:
        nonlocal waiting, done, failure
        try:
            for item in items:
                size = nbytes(item)
                with state:
                    state.wait_for(lambda size=size: stopped or not ready or waiting + size <= limit)  # type: ignore[misc]
                    if stopped:
                        return
                    ready.append((item, size))
                    waiting += size
                    state.notify_all()
        except BaseException as error:
            failure = error
        finally:
            with state:
                done = True
                state.notify_all()

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while True:
            with state:
                state.wait_for(lambda: bool(ready) or done)
                if not ready:
                    break
                item, size = ready.popleft()
                waiting -= size
                state.notify_all()
            yield item
            del item
        if failure is not None:
            raise failure
    finally:
        with state:
            stopped = True
            state.notify_all()
        thread.join()
