"""One worker at a time on an artifact: a lease is a small file that its holder renews.

A lease file is `<root>/.leases/<stage>-<key>.<generation>` and only one process can create it: O_EXCL in a folder, a conditional put on
an object store. The highest generation holds. A dead holder's file is not removed to make room, which two processes could do to each
other: the next one creates the generation above it. Whoever has created a file looks again, and withdraws where it sees one that it
has not found dead before; a holder renews its file first and looks afterwards. So of two that meet, one at least sees the other.

A holder is dead when its process on this machine is, or when its file has not changed while somebody watched for `DEAD_AFTER_S`:
clocks need not agree. Backends without a conditional put (any but S3, GCS and Azure) check and then write, so there the creator
waits `SETTLE_S` before it looks who is in the file: the last one to write wins.
"""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puzzle_ray.errors import StoreError
from puzzle_ray.store.root import Root
from puzzle_ray.store.scratch import is_running, process_space, process_start

LEASES = ".leases"
BEAT_EVERY_S = 10.0
DEAD_AFTER_S = 120.0
UNWRITTEN_FOR_S = 5.0  # its creator was killed before it wrote into the file
SAY_EVERY_S = 60.0
LOOK_EVERY_S = 1.0
SETTLE_S = 2.0
_EXCLUSIVE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}  # their create mode is a conditional put


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Claim:
    """Who holds an artifact: what of a lease travels to other processes that work for its holder."""

    name: str
    generation: int
    token: str
    taken_at: float = field(default_factory=time.time, compare=False)  # seconds since 1970

    @property
    def file(self) -> str:
        return f"{self.name}.{self.generation}"


@dataclass(frozen=True)
class Found:
    """A lease file as it was read. `content` and `changed` change whenever its holder renews it."""

    file: str
    generation: int
    content: bytes
    changed: int

    @property
    def holder(self) -> dict[str, Any]:
        """Empty for a file that is being written, or whose writer was killed."""
        try:
            return dict(json.loads(self.content))
        except (ValueError, TypeError):
            return {}

    @property
    def words(self) -> str:
        holder = self.holder
        return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, at work since {holder.get('since', '?')}"

    @property
    def is_dead_here(self) -> bool:
        """Its process was one of this machine and is gone."""
        holder = self.holder
        return holder.get("space") == process_space() and not is_running(int(holder["pid"]), holder.get("started"))


def leases(root: Root, name: str | None = None) -> list[Found]:
    """All lease files of a store, or of one artifact."""
    found = []
    for file in root.names(f"{root.root}/{LEASES}"):
        of, _, generation = file.rpartition(".")
        if generation.isdigit() and name in (None, of):
            with suppress(FileNotFoundError):  # released meanwhile
                found.append(_read(root, file, int(generation)))
    return found


def _read(root: Root, file: str, generation: int) -> Found:
    path = f"{root.root}/{LEASES}/{file}"
    content = bytes(root.filesystem.cat_file(path))
    return Found(file, generation, content, os.stat(path).st_mtime_ns if root.is_local else 0)


def remove_lease(root: Root, found: Found) -> None:
    """Removes a lease file that is as it was when it was read."""
    with suppress(FileNotFoundError):
        if _read(root, found.file, found.generation) == found:
            root.filesystem.rm_file(f"{root.root}/{LEASES}/{found.file}")
    if root.is_local:
        with suppress(OSError):  # others are in it
            Path(root.root, LEASES).rmdir()


def reason_lost(root: Root, claim: Claim) -> str | None:
    """Why the claim no longer holds, or None. Raises what the store's backend does where it cannot be reached."""
    for attempt in (1, 2):
        ours = leases(root, claim.name)
        mine = [found for found in ours if found.generation == claim.generation and found.holder.get("token") == claim.token]
        above = [found for found in ours if found.generation > claim.generation]
        if not mine:
            return f"it was taken over by {above[0].words}" if above else "it is gone"
        if not above:
            return None
        if attempt == 1:
            time.sleep(LOOK_EVERY_S)  # one that has only just created its file sees ours, and withdraws
    return f"it was taken over by {above[0].words}"


_HELD: set[Lease] = set()  # by this process, so that one that ends at once can release them


def release_all() -> None:
    """Releases whatever this process holds."""
    for lease in list(_HELD):
        lease.release()


class Lease:
    """Held from `acquire` to `release`, and renewed by a thread meanwhile."""

    def __init__(self, root: Root, name: str, say: Callable[[str], None] = say_on_stderr) -> None:
        self.root, self.name, self.say = root, name, say
        self.claim: Claim | None = None
        self.lost: str | None = None
        self._watched: dict[str, tuple[Found, float]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._beats, self._since, self._renewed = 0, "", 0.0
        self._thread: threading.Thread | None = None

    def acquire(self, timeout_s: float | None = None) -> None:
        """Waits until nobody else holds it. Raises StoreError after `timeout_s`, which says who does."""
        started, said = time.monotonic(), -SAY_EVERY_S
        while True:
            others = self._others()
            alive = [found for found in others if not self._is_dead(found)]
            if not alive:
                if self._try(others):
                    break
                time.sleep(random.uniform(0.0, LOOK_EVERY_S))
                continue
            waited = time.monotonic() - started
            if timeout_s is not None and waited >= timeout_s:
                problem = f"{self.name} is being worked on by {alive[0].words}"
                raise StoreError("store", problem, "wait for it to end, or end it, and run the same command again")
            if waited - said >= SAY_EVERY_S:
                said = waited
                self.say(f"[{self.name.rpartition('-')[0]}] waits for {alive[0].words}")
            time.sleep(LOOK_EVERY_S if timeout_s is None else max(0.0, min(LOOK_EVERY_S, timeout_s - waited)))
        _HELD.add(self)
        self._thread = threading.Thread(target=self._renew_until_released, name=f"lease-{self.name}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises StoreError when the lease was lost, which a process that stood still for long finds out."""
        with self._lock:
            if self.lost is None and self.claim is not None:
                self._renew()
        self.check_seen()

    def check_seen(self) -> None:
        """The same by what is known already, without asking the store."""
        if self.lost is not None:
            problem = f"this run lost {self.name} while it worked on it: {self.lost}"
            raise StoreError("store", problem, "run the same command again: what the other run finished is reused")

    def release(self) -> None:
        """Nobody holds it any more. Where the store cannot be reached, the others see that it is no longer renewed."""
        self._ended.set()
        _HELD.discard(self)
        with self._lock, suppress(Exception):  # every backend has errors of its own
            claim, self.claim = self.claim, None
            if claim is not None and self.lost is None:
                for found in self._others():
                    if found.file == claim.file and found.holder.get("token") == claim.token:
                        remove_lease(self.root, found)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

    # how it is done

    def _others(self) -> list[Found]:
        return leases(self.root, self.name)

    def _is_dead(self, found: Found) -> bool:
        before, since = self._watched.get(found.file, (None, 0.0))
        if before != found:
            since = time.monotonic()
            self._watched[found.file] = (found, since)
        limit_s = DEAD_AFTER_S if found.holder else min(DEAD_AFTER_S, UNWRITTEN_FOR_S)
        return found.is_dead_here or time.monotonic() - since > limit_s

    def _try(self, dead: list[Found]) -> bool:
        """Creates the generation above all dead ones, and looks whether somebody else did something at the same time."""
        self._beats, self._since = 0, time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        claim = Claim(self.name, max((found.generation for found in dead), default=0) + 1, uuid.uuid4().hex)
        self._renewed = _clock()
        if not self._create(claim):
            return False
        if not (self.root.is_local or self._has_conditional_put):
            time.sleep(SETTLE_S)
        there = self._others()
        mine = [found for found in there if found.file == claim.file and found.holder.get("token") == claim.token]
        if not mine or any(found.file != claim.file and found not in dead for found in there):
            for found in mine:
                remove_lease(self.root, found)
            return False
        for found in dead:
            remove_lease(self.root, found)
        self.claim = claim
        return True

    @property
    def _has_conditional_put(self) -> bool:
        protocol = self.root.filesystem.protocol
        return bool(_EXCLUSIVE & ({protocol} if isinstance(protocol, str) else set(protocol)))

    def _create(self, claim: Claim) -> bool:
        """False where the file is there already."""
        path, content = self._path(claim), self._content(claim)
        try:
            if not self.root.is_local:
                self.root.filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                self.root.filesystem.pipe_file(path, content, mode="create")
                return True
            os.makedirs(os.path.dirname(path), exist_ok=True)
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:  # of a put whose answer was lost and that was sent again, too: the token will tell
            return not self.root.is_local
        except OSError as error:
            if self.root.is_local and isinstance(error, FileNotFoundError):  # a release removed the empty folder
                return False
            code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
            if code in ("ConditionalRequestConflict", "409"):  # two puts at once; the next look tells who is there
                return False
            remedy = "name a folder or URL that can be written, then run the same command"
            raise StoreError("store", f"{path} cannot be written ({error})", remedy) from None
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        return True

    def _path(self, claim: Claim) -> str:
        return f"{self.root.root}/{LEASES}/{claim.file}"

    def _content(self, claim: Claim) -> bytes:
        about = {
            "token": claim.token,
            "host": socket.gethostname(),
            "space": process_space(),
            "pid": os.getpid(),
            "started": process_start(os.getpid()),
            "since": self._since,
            "renewed": self._beats,
        }
        return json.dumps(about).encode()

    def _renew(self) -> None:
        """Shows that the holder lives, and looks whether it was taken for dead."""
        assert self.claim is not None
        at = _clock()
        try:
            self.lost = reason_lost(self.root, self.claim)  # what was removed must not come back
            if self.lost is None:
                self._beats += 1
                if self.root.is_local:
                    os.utime(self._path(self.claim))
                else:
                    self.root.filesystem.pipe_file(self._path(self.claim), self._content(self.claim))
                self.lost = reason_lost(self.root, self.claim)
            self._renewed = at
        except Exception as error:  # every backend has errors of its own; the next beat tries again
            if _clock() - self._renewed > DEAD_AFTER_S:
                self.lost = f"it could not be renewed for {DEAD_AFTER_S:g} s ({type(error).__name__}: {error})"

    def _renew_until_released(self) -> None:
        while not self._ended.wait(BEAT_EVERY_S):
            with self._lock:
                if self.claim is None or self.lost is not None:
                    return
                self._renew()


def _clock() -> float:
    """Seconds that go on while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@contextmanager
def held(lease: Lease, timeout_s: float | None) -> Iterator[Lease]:
    """Holds the lease while the block runs, however it ends."""
    try:
        lease.acquire(timeout_s)
        yield lease
    finally:
        lease.release()
