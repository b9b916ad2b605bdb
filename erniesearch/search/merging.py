"""Calls from many threads, done one batch at a time."""

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Call:
    key: Hashable
    item: Any
    work: Callable[[Sequence[Any]], Sequence[Any]]
    done: bool = False
    result: Any = None
    error: BaseException | None = None


class MergingQueue:
    """First come, first served; waiting calls with the same key are done together.

    There is no thread of its own: whoever finds nobody at work takes the oldest waiting calls,
    at most ``limit``, and does them for all.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._waiting: list[_Call] = []
        self._busy = False
        self._changed = threading.Condition()

    def call(
        self, key: Hashable, item: Item, work: Callable[[Sequence[Item]], Sequence[Result]]
    ) -> Result:
        """This item's result of ``work(items)``, where items are those of merged calls.

        Calls of one key must mean the same work. An exception reaches the caller whose item
        raises it and no other: items that fail together are done again one by one.
        """
        own = _Call(key, item, work)
        with self._changed:
            self._waiting.append(own)
            while not own.done:
                if self._busy:
                    self._changed.wait()
                    continue
                batch = self._take()
                self._busy = True
                self._changed.release()
                try:
                    _do(batch)
                finally:
                    self._changed.acquire()
                    self._busy = False
                    for call in batch:
                        call.done = True
                    self._changed.notify_all()
        if own.error is not None:
            raise own.error
        result: Result = own.result
        return result

    def _take(self) -> list[_Call]:
        """The oldest call and those behind it with its key."""
        first = self._waiting[0]
        batch = [call for call in self._waiting if call.key == first.key][: self.limit]
        self._waiting = [call for call in self._waiting if call not in batch]
        return batch


def _do(batch: list[_Call]) -> None:
    try:
        results = batch[0].work([call.item for call in batch])
        for call, result in zip(batch, results, strict=True):
            call.result = result
    except BaseException as error:
        if len(batch) == 1 or not isinstance(error, Exception):
            for call in batch:
                call.error = error
            return
        for call in batch:
            _do([call])
