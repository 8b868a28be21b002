"""The writer of a store: a queue, and a thread that commits all that waits in it at once."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Writer(Generic[Item]):
    """Commits items in the order in which they come.

    The thread lives while there is something to commit, and the interpreter waits for it at its exit: nothing that was
    put is lost to a program that ends. What cannot be committed is not left out: the writer stops, and says so.

    Args:
        commit: Commits items, all or none.
        synchronous: Commit every item in the call that puts it, and have no thread.
    """

    def __init__(self, commit: Callable[[list[Item]], None], *, synchronous: bool) -> None:
        self._commit = commit
        self._synchronous = synchronous
        self._changed = threading.Condition()
        self._waiting: list[Item] = []
        self._put = self._committed = 0
        self._running = False
        self._error: BaseException | None = None

    def put(self, item: Item) -> None:
        """Have an item committed. In order only if callers take turns.

        Raises:
            RuntimeError: An item could not be committed.
        """
        with self._changed:
            self.check()
            if not (self._synchronous or self._running):
                threading.Thread(target=self._run, name="memory store writer").start()
                self._running = True
            self._waiting.append(item)
            self._put += 1
        if self._synchronous:
            self._run()
            self.check()

    def flush(self) -> None:
        """Wait until everything that was put before is committed.

        Raises:
            RuntimeError: An item could not be committed.
        """
        with self._changed:
            target = self._put
            self._changed.wait_for(lambda: self._committed >= target or self._error is not None)
            self.check()

    def _run(self) -> None:
        while True:
            with self._changed:
                items, self._waiting = self._waiting, []
                if not items:
                    self._running = False
                    return
            error: BaseException | None = None
            try:
                self._commit(items)
            except BaseException as raised:
                error = raised
            with self._changed:
                self._committed += len(items)
                self._error = error
                self._changed.notify_all()
            if error is not None:
                if not isinstance(error, Exception):
                    raise error
                return

    def check(self) -> None:
        """Say if an item could not be committed.

        Raises:
            RuntimeError: So it was.
        """
        if self._error is not None:
            raise RuntimeError(
                f"the store could not commit what was appended, and takes nothing any more: {self._error!r}; what was "
                f"committed before can be read: open the store again to go on from there"
            ) from self._error
