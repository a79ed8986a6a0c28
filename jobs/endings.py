"""How a command ends before its time: by Ctrl-C, by SIGTERM, or because its Ray died.

The first signal is raised in the main thread as a KeyboardInterrupt, so everything on the way releases what it holds. Native code may
hold the main thread for long, and a cleanup may wait for what never comes. So a thread watches: when the main thread is not at its end
in time, or at a second Ctrl-C, it says the line itself, releases the leases, ends all processes of our own Ray, and then this one.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from puzzle_ray.errors import ClusterError

INTERRUPTED, TERMINATED, FAILED = 130, 143, 1
CONTINUES = "the same command continues"
LINE = f"interrupted; {CONTINUES}"
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in the driver of a submitted job
GRACE_S = 9.0  # from the first signal, for the main thread to come to its end
GRACE_OF_SUBMITTED_S = 2.0  # `ray job stop` kills after 3 s
RELEASE_S = 2.0
LOOK_EVERY_S = 0.2  # at the processes of our own Ray
CONNECT_EVERY_S = 2.0  # to the cluster that was joined
CLUSTER_IS_DEAD_AFTER_S = 20.0  # without an answer
RAYS_PROCESSES = ("gcs_server", "raylet")  # without one of them a Ray is dead
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
_ROUNDS = 5  # of killing: those whose parents are killed come to us
_SHOW_CURSOR = b"\x1b[?25h"


class Terminated(KeyboardInterrupt):
    """SIGTERM. Whoever handles an interrupt handles it."""


class Signals:
    """The signals of one command, and the watch over its own Ray."""

    def __init__(self) -> None:
        self.first: int | None = None  # the signal that ends the command
        self._raised = False
        self._log: Path | None = None
        self._processes: dict[int, str] = {}  # of our own Ray, by process id
        self._wakes_to_raise = self._wakes_to_skip = 0
        self._ending, self._saying, self._said = threading.Lock(), threading.Lock(), False
        self._grace_s = GRACE_OF_SUBMITTED_S if SUBMITTED in os.environ else GRACE_S

    @property
    def code(self) -> int:
        return TERMINATED if self.first == signal.SIGTERM else INTERRUPTED

    def __enter__(self) -> Signals:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self.take()
        threading.Thread(target=self._watch, name="endings", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)  # ends the thread

    def take(self) -> None:
        """Our handlers, in place of those that are there. Ray sets its own when it starts."""
        for number in self._before:
            signal.signal(number, self._on_signal)

    def wake_main_thread(self) -> None:
        """Raises a KeyboardInterrupt in the main thread, wherever it waits, that no user caused."""
        self._wakes_to_raise += 1
        self._wakes_to_skip += 1
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _on_signal(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and self._wakes_to_raise:
            self._wakes_to_raise -= 1
            raise KeyboardInterrupt
        self.first = self.first or number
        if not self._raised:
            self._raised = True
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    # the watching thread

    def _watch(self) -> None:
        deadline: float | None = None
        while True:
            ready, _, _ = select.select([self._read], [], [], LOOK_EVERY_S)
            if ready:
                numbers = os.read(self._read, 64)
                if not numbers:
                    os.close(self._read)
                    return
                for number in numbers:
                    if self._is_ours(number):
                        if deadline is not None and number == signal.SIGINT:
                            self.end_now(self.code, LINE)
                        deadline = deadline or time.monotonic() + self._grace_s
                        self.first = self.first or number  # native code may keep the main thread from its handler
            if deadline is not None and time.monotonic() > deadline:
                self.end_now(self.code, LINE)
            if deadline is None:
                self.check_ray()

    def _is_ours(self, number: int) -> bool:
        if number == signal.SIGINT and self._wakes_to_skip:
            self._wakes_to_skip -= 1
            return False
        return number in self._before and signal.getsignal(number) == self._on_signal  # a server handles them itself

    # our own Ray

    def watch_ray(self, log: Path | None) -> None:
        """Watches the Ray that this process has just started."""
        import psutil

        self._log = log
        self._processes = {p.pid: p.name() for p in psutil.Process().children() if p.name() in RAYS_PROCESSES}

    def check_ray(self) -> None:
        """Ends this process where one of our own Ray's is dead: Ray itself would wait for long, and then abort."""
        for pid, name in self._processes.items():
            if not _lives(pid) and self._processes:
                self.end_now(FAILED, f"error: {name} of this run's own Ray (process {pid}) died; {CONTINUES}{self._where()}")

    def leave_ray(self) -> None:
        """From now on its processes may go."""
        self.check_ray()
        self._processes = {}

    # a cluster that was joined

    @contextmanager
    def cluster_watched(self, address: str, log: Path | None) -> Iterator[None]:
        """Ends this process where nothing has listened at the cluster's address for long: Ray itself would wait for a minute, and then
        abort. Not in the thread of the signals, which a connection that hangs would keep."""
        left, self._log = threading.Event(), log
        threading.Thread(target=self._watch_cluster, args=(address, left), name="cluster", daemon=True).start()
        try:
            yield
        finally:
            left.set()
            self._log = None

    def _watch_cluster(self, address: str, left: threading.Event) -> None:
        answered_at = time.monotonic()
        while not left.wait(CONNECT_EVERY_S):
            if _answers(address):
                answered_at = time.monotonic()
            elif time.monotonic() - answered_at > CLUSTER_IS_DEAD_AFTER_S and self.first is None and not left.is_set():
                self.end_now(FAILED, f"error: the cluster at {address} no longer answers; {CONTINUES}{self._where()}")

    def _where(self) -> str:
        return f"; what Ray printed is in {self._log}" if self._log is not None and self._log.stat().st_size else ""

    def say(self, line: str) -> None:
        """The last line of a command that is ended: once, whoever comes first."""
        with self._saying:
            if not self._said:
                self._said = True
                _write_line(line)

    def end_now(self, code: int, line: str) -> NoReturn:
        """Without the main thread, which may never come to its end."""
        self._ending.acquire()  # for good: another thread that comes here waits for the end
        from puzzle_ray.store.lease import release_all

        self.say(line)
        releasing = threading.Thread(target=release_all, daemon=True)
        releasing.start()
        releasing.join(RELEASE_S)
        if code != FAILED and self._log is not None:
            self._log.unlink(missing_ok=True)
        for own in _own_processes:
            own.end()
        os._exit(code)


_current: Signals | None = None


def current() -> Signals | None:
    """Of the command that this process runs, where its signals are handled here."""
    return _current


@contextmanager
def handled() -> Iterator[Signals]:
    """The signals of the command that runs in the block. In another thread than the main one they stay with whoever has them."""
    global _current
    if threading.current_thread() is not threading.main_thread() or _current is not None:
        yield _current or Signals()
        return
    with Signals() as _current:
        try:
            yield _current
        finally:
            _current = None


def wake_main_thread() -> None:
    """Raises a KeyboardInterrupt in the main thread, wherever it waits."""
    if _current is not None:
        _current.wake_main_thread()
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@contextmanager
def starting() -> Iterator[None]:
    """While Ray starts. It takes SIGTERM for itself, and its handler exits with the signal's number."""
    try:
        yield
    except SystemExit as error:
        if error.code == signal.SIGTERM:
            if _current is not None:
                _current.first = signal.SIGTERM
            raise Terminated from None
        problem = f"Ray ended while it started (exit code {error.code})"
        raise ClusterError("cluster", problem, "see that this machine has memory and processes left") from None
    finally:
        if _current is not None:
            _current.take()


def _answers(address: str) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_EVERY_S).close()
    except OSError:
        return False
    return True


def _lives(pid: int) -> bool:
    from puzzle_ray.store.scratch import is_running

    return is_running(pid)


class Descendants:
    """The processes below this one that start while a block runs. After it, none of them is left."""

    def __init__(self) -> None:
        self._others = set(_children())

    def __enter__(self) -> None:
        with suppress(OSError, AttributeError):  # Linux: a process whose parent dies becomes a child of this one
            ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
        _own_processes.append(self)

    def __exit__(self, *_: object) -> None:
        self.end()
        _own_processes.remove(self)

    def end(self) -> None:
        """Kills them."""
        import psutil

        for _ in range(_ROUNDS):
            own = [process for process in _children() if process not in self._others]
            left = [process for process in (*own, *_below(own)) if _runs(process)]
            if not left:
                return
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=1.0)


_own_processes: list[Descendants] = []


def _children() -> list[Any]:
    import psutil

    return list(psutil.Process().children())


def _below(processes: list[Any]) -> list[Any]:
    import psutil

    found: list[Any] = []
    for process in processes:
        with suppress(psutil.Error):
            found += process.children(recursive=True)
    return found


def _runs(process: Any) -> bool:
    import psutil

    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _write_line(line: str) -> None:
    """Straight to the descriptor: the main thread may hold the stream."""
    try:
        descriptor = sys.stderr.fileno()
        os.write(descriptor, (_SHOW_CURSOR if os.isatty(descriptor) else b"") + f"{line}\n".encode())
    except (OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


# what Ray's native code prints


def keep_stderr() -> None:
    """Gives `sys.stderr` a descriptor of its own. Native code, such as Ray's, writes to descriptor 2 itself."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")


@contextmanager
def native_prints_logged() -> Iterator[Path | None]:
    """Whatever is written to descriptor 2 itself goes to a file: what Ray's native code says when it dies is no message for a user.

    The file goes with the block unless the block fails. Does nothing where `sys.stderr` writes to descriptor 2 as well.
    """
    try:
        ours = sys.stderr.fileno() != 2
    except (OSError, ValueError):
        ours = False  # a test's stream
    if not ours:
        yield None
        return
    path = log_file("ray")
    before, log = os.dup(2), os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(log, 2)
    os.close(log)
    failed = False
    try:
        yield path
    except Exception:
        failed = True
        raise
    finally:
        os.dup2(before, 2)
        os.close(before)
        if not failed or not path.stat().st_size:
            path.unlink(missing_ok=True)


def log_file(about: str) -> Path:
    """A new file's path in this user's folder of logs."""
    folder = Path(tempfile.gettempdir()) / f"puzzle-ray-errors-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{about}.log"


def ended(code: int) -> NoReturn:
    """Ends the process. One that failed does not wait for its threads: a stage in the background may be at work still."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if code:
        os._exit(code)
    sys.exit(code)
