"""An event loop on a thread of its own, on which code without an event loop runs coroutines."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from ruyi_flow.errors import RequestError, RuyiFlowError

__all__ = ["CLOSED", "FORKED", "BackgroundLoop"]

T = TypeVar("T")

CLOSED = "this client is closed; make another one"
"""Message of a call on a closed client."""

FORKED = (
    "this process was forked from one whose client had connected, and connections do not survive os.fork: "
    "make a client in each process, and start processes with multiprocessing's method 'spawn'"
)
"""Message of a call in a process that was forked from the client's own."""

_CLOSING_S = 2.0
"""Seconds that a closing loop waits for the calls on it to end by themselves."""

_EXIT_S = 10.0
"""Seconds that the end of the interpreter waits for the loop, for instance for a step of the model that is running."""


class BackgroundLoop:
    """An event loop whose thread starts with the first call and ends with `close`, or with the interpreter.

    Several threads may use it at once.

    Args:
        finish: a coroutine function that runs on the loop before it ends.
    """

    def __init__(self, finish: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._finish = finish
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._process_id = os.getpid()
        self._error: BaseException | None = None
        # Reentrant: the garbage collector may end an abandoned iteration while its thread holds the lock.
        self._lock, self._is_closed, self._is_exiting = threading.RLock(), False, False
        # A daemon: when Ctrl-C interrupts `close`, the process can end before the thread does.
        self._thread = threading.Thread(target=self._work, name="ruyi-flow client", daemon=True)

    @property
    def is_closed(self) -> bool:
        """Whether it accepts no more calls."""
        return self._is_closed

    def run(self, call: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine on the loop and return its result.

        Ctrl-C reaches only the calling thread, so it cancels the coroutine and waits for its end.

        Raises:
            RequestError: the loop is closed, belongs to another process, or is the loop of the calling thread.
        """
        tasks: list[asyncio.Task[T]] = []
        ended = threading.Event()

        async def awaited() -> T:
            return await call()

        def start() -> None:
            tasks.append(asyncio.ensure_future(awaited()))
            tasks[0].add_done_callback(lambda _: ended.set())

        if threading.current_thread() is self._thread:
            raise RequestError("this thread runs the client's own event loop, which must not wait for itself")
        loop = self._call_soon(start)
        try:
            ended.wait()
        except BaseException:
            loop.call_soon_threadsafe(lambda: tasks[0].cancel())  # after `start`: the loop keeps the order
            ended.wait()
            raise
        self._hold_daemon()
        if tasks[0].cancelled():
            raise RequestError("the client was closed while it answered")
        if isinstance(error := tasks[0].exception(), RuyiFlowError):
            raise error.with_traceback(None)  # it says what is wrong; the frames of the loop's thread are noise
        return tasks[0].result()

    def iterate(self, items: AsyncIterator[T], close: Callable[[], Awaitable[None]]) -> Generator[T, None, None]:
        """Yield what an asynchronous iterator yields, and call `close` at the end.

        The end is also that of a caller who stops early, so that the nodes free their KV caches at once.
        """

        async def next_item() -> T | None:
            return await anext(items, None)

        try:
            while (item := self.run(next_item)) is not None:
                yield item
        finally:
            if not self._is_closed and os.getpid() == self._process_id:
                if threading.current_thread() is self._thread:  # the garbage collector ends the iteration here
                    asyncio.ensure_future(close())
                else:
                    self.run(close)

    def stop(self) -> None:
        """Ask the loop to end, and do not wait for it."""
        if os.getpid() != self._process_id:
            return
        with self._lock:
            self._is_closed = True
            if self._loop is not None:
                with suppress(RuntimeError):  # it has ended already
                    self._loop.call_soon_threadsafe(self._stop.set)

    def close(self) -> None:
        """End the loop and its thread. Ctrl-C ends the wait for it only."""
        self._join(None)
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _join(self, timeout_s: float | None) -> None:
        self.stop()
        is_here = os.getpid() == self._process_id and self._thread is not threading.current_thread()
        if is_here and self._loop is not None:
            self._thread.join(timeout_s)

    def _exit(self) -> None:
        """End the loop when the interpreter ends."""
        self._is_exiting = True
        self._join(_EXIT_S)

    def _call_soon(self, call: Callable[[], None]) -> asyncio.AbstractEventLoop:
        """Call a function on the loop, which is started for the first call."""
        if self._loop is None:
            self._process_id = os.getpid()
        elif os.getpid() != self._process_id:  # before the lock, which a thread of the other process may have held
            raise RequestError(FORKED)
        if self._is_closed:
            self._hold_daemon()
        with self._lock:
            if self._is_closed:
                raise RequestError(CLOSED)
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._loop.set_default_executor(_Threads())
                atexit.register(self._exit)
                self._thread.start()
            self._loop.call_soon_threadsafe(call)
            return self._loop

    def _hold_daemon(self) -> None:
        """Keep a daemon thread waiting while the interpreter ends; an error would be a stack trace of that thread."""
        if self._is_exiting and threading.current_thread().daemon:
            threading.Event().wait()

    def _work(self) -> None:
        assert self._loop is not None
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:  # the thread that closes the loop raises it
            self._error = error
        finally:
            self._loop.close()
            atexit.unregister(self._exit)

    async def _serve(self) -> None:
        try:
            await self._stop.wait()
            await self._finish()
        finally:
            # Calls that other threads wait for end with an error of their own. gRPC's tasks end when its calls have:
            # what completes after the loop is closed would be a stack trace on another loop.
            ending = asyncio.all_tasks() - {asyncio.current_task()}
            if ending:
                await asyncio.wait(ending, timeout=_CLOSING_S)
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
            await asyncio.get_running_loop().shutdown_asyncgens()


class _Threads(ThreadPoolExecutor):
    """An executor that starts a daemon thread for each call.

    Python's own refuses every call once the main thread has ended, although other threads may still use the client.
    """

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Call a function on a new thread."""
        future: Future[T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        try:
            threading.Thread(target=work, name="ruyi-flow call", daemon=True).start()
        except RuntimeError:  # the interpreter ends and starts no thread, so nothing else is waiting for this one
            work()
        return future
