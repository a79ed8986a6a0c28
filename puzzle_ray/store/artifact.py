"""The store and its artifacts: reading and writing files of one stage run, finishing it, and seeing what is damaged."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle_ray.errors import Damaged, StoreError
from puzzle_ray.store import cache, publish, scratch
from puzzle_ray.store.files import OTHER_CHECKSUM, Checked, for_each, looks_broken, tensors_as_bytes, tensors_beside, unwritten
from puzzle_ray.store.lease import Claim, Lease, held, reason_lost, say_on_stderr
from puzzle_ray.store.record import (
    DAMAGE_SEEN,
    RECORD,
    UNREADABLE,
    FileEntry,
    Problem,
    Record,
    State,
    content_key,
    problems_of,
    unreadable,
)
from puzzle_ray.store.root import Root, is_hidden
from puzzle_ray.store.written import Written

if TYPE_CHECKING:
    from torch import Tensor

AGAIN = "run the command that made it again: it makes what is lost, and nothing else"
_LOOK_AGAIN_AFTER_S = 5.0  # for a record that was not there


class Store(Root):
    """A root under which artifacts are kept. Opening one touches nothing; `check` proves that it can be written."""

    def artifact(self, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Artifact:
        """The folder of one stage run, finished or not."""
        return Artifact(self, stage, content_key(stage, settings, inputs), dict(settings), dict(inputs))


class Artifact:
    """One stage run's folder.

    A finished one is never changed; whatever is read from it is compared with its record: sizes always, checksums when this process
    reads a file for the first time. Items of an unfinished one are compared with what was noted beside them. It travels to other
    processes, which then work under the lease that is held here.
    """

    def __init__(
        self, store: Store, stage: str, key: str, settings: dict[str, Any], inputs: dict[str, str], claim: Claim | None = None
    ) -> None:
        self.store, self.stage, self.key, self.settings, self.inputs, self.claim = store, stage, key, settings, inputs, claim
        self._lease: Lease | None = None
        self._record: Record | None = None
        self._no_record_until = 0.0
        self._checked = Checked(store)
        self._written = Written(store, self.url, self._checked)

    def __reduce__(self) -> tuple[Any, ...]:
        return Artifact, (self.store, self.stage, self.key, self.settings, self.inputs, self.claim)

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.key}"

    @property
    def url(self) -> str:
        return f"{self.store.root}/{self.name}"

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    # what there is

    @property
    def finished(self) -> bool:
        return self.state() == "finished"

    def state(self) -> State:
        """What a look at names and sizes tells. `damaged`: the record cannot be read, a file is missing or of another size, or a
        reader found one that is not as it was written."""
        sizes = self.store.sizes(self.url)
        if RECORD not in sizes:
            return "unfinished" if any(not is_hidden(name) for name in sizes) else "absent"
        record = self.record(fresh=True)
        return "damaged" if record is None or DAMAGE_SEEN in sizes or record.missing_or_changed(sizes) else "finished"

    def record(self, *, fresh: bool = False) -> Record | None:
        """None where the artifact is not finished, or its record cannot be read."""
        if fresh or (self._record is None and time.monotonic() >= self._no_record_until):
            try:
                self._record = Record.from_json(bytes(self.store.filesystem.cat_file(self.path(RECORD))))
            except FileNotFoundError:
                self._record = None
            self._no_record_until = time.monotonic() + _LOOK_AGAIN_AFTER_S
        return self._record

    def exists(self, name: str) -> bool:
        return bool(self.store.filesystem.exists(self.path(name)))

    def names(self, folder: str = "") -> list[str]:
        """File names directly inside the artifact's folder (or a folder in it), hidden ones left out."""
        return [name for name in self.store.names(self.path(folder) if folder else self.url) if not name.startswith(".")]

    def facts(self) -> dict[str, Any]:
        """What the finished stage recorded about itself. Raises StoreError where there is no record, or none that can be read."""
        record = self.record(fresh=True)
        if record is None:
            self.read(RECORD)
            self.check_record()
            raise self._damaged(RECORD, UNREADABLE)
        return dict(record.facts)

    def record_problem(self) -> str:
        """What is wrong with the record. Empty where it is all right, and where there is none."""
        try:
            data = bytes(self.store.filesystem.cat_file(self.path(RECORD)))
        except FileNotFoundError:
            return ""
        return "" if Record.from_json(data) else unreadable(data)

    def check_record(self) -> None:
        """Raises Damaged for a record that cannot be read, unless another version wrote it."""
        if self.record_problem() == UNREADABLE:
            raise self._damaged(RECORD, UNREADABLE)

    # reading

    def read(self, name: str) -> bytes:
        """Raises StoreError when there is no such file, Damaged when it is not the one that was written."""
        entry = self._entry(name)
        try:
            data = bytes(self.store.filesystem.cat_file(self.path(name)))
        except FileNotFoundError:
            if entry is not None:
                raise self._damaged(name, "is missing") from None
            raise StoreError("store", f"{self.path(name)} is missing", "run the stage that makes it again") from None
        except OSError as error:
            raise StoreError("store", f"{self.path(name)} cannot be read ({error})", "mend that, then run again") from None
        if entry is not None:
            problem = self._checked.problem_of(self.path(name), entry, data)
        else:
            problem = None if is_hidden(name) or name == RECORD else self._written.problem_of(name, data)
        if problem:
            raise self._damaged(name, problem)
        return data

    def read_json(self, name: str) -> Any:
        data = self.read(name)
        try:
            return json.loads(data)
        except ValueError as error:
            raise self._damaged(name, f"is damaged (no JSON: {error})") from None

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of a safetensors file and its metadata."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        data = self.read(name)
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            return load(data), header.get("__metadata__", {})
        except (SafetensorError, ValueError) as error:
            raise self._damaged(name, f"is damaged (no safetensors file: {error})") from None

    def local_folder(self, name: str) -> Path:
        """A folder of this artifact on the local disk: itself, or a copy kept in the temporary directory. Raises StoreError."""
        record = self.record()
        listed = record.files if record else publish.published(self.store, self.url).get(name, {})
        entries = {file: entry for file, entry in listed.items() if file.startswith(f"{name}/")}
        if not (entries or (self.store.is_local and self.store.filesystem.isdir(self.path(name)))):
            raise StoreError("store", f"{self.path(name)} is missing", "run the stage that makes it again")
        for problem in problems_of(entries, {f"{name}/{k}": v for k, v in self.store.sizes(self.path(name)).items()}):
            raise self._damaged(problem.file, problem.what)
        if self.store.is_local:
            folder, problems = Path(self.path(name)), self._problems_in(Path(self.path(name)), name, entries)
        else:
            words = f"{self.name}-{name.replace('/', '-')}"
            folder = cache.local_copy(self.store.filesystem, self.path(name), words)
            problems = self._problems_in(folder, name, entries)
            if problems:  # of the copy, or of what it is a copy of
                cache.forget(folder)
                folder = cache.local_copy(self.store.filesystem, self.path(name), words)
                problems = self._problems_in(folder, name, entries)
        for problem in problems:
            raise self._damaged(problem.file, problem.what)
        return folder

    def _problems_in(self, folder: Path, name: str, entries: Mapping[str, FileEntry]) -> list[Problem]:
        looked = ((f, self._checked.problem_of_file(folder / f.removeprefix(f"{name}/"), e)) for f, e in entries.items())
        return [Problem(file, what) for file, what in looked if what]

    def _entry(self, name: str) -> FileEntry | None:
        record = None if name == RECORD else self.record()
        return record.files.get(name) if record else None

    def _damaged(self, name: str, what: str) -> Damaged:
        """The error to raise."""
        remedy = AGAIN if self.mark_damaged(f"{name} {what}") else f"remove {self.path(name)}, then {AGAIN}"
        return Damaged(self.stage, f"{self.path(name)} {what}", remedy)

    def mark_damaged(self, what: str) -> bool:
        """Leaves a mark that makes the next run look at every file: a flipped bit keeps a file's size. False where it cannot."""
        try:
            self.store.filesystem.pipe_file(self.path(DAMAGE_SEEN), what.encode())
        except Exception:  # every backend has errors of its own
            return False
        return True

    # writing

    def write(self, name: str, data: bytes) -> None:
        """Atomic. Raises StoreError when it cannot be written (a full disk, say); an older file then still stands. In a finished
        artifact the same content is no change, and any other is refused."""
        target, local = self.path(name), self.store.is_local  # elsewhere, an object appears when its upload is complete
        put = partial(scratch.write_atomically, Path(target)) if local else partial(self.store.filesystem.pipe_file, target)
        self._put(name, FileEntry(len(data), hashlib.sha256(data).hexdigest()), partial(put, data))

    def _put(self, name: str, entry: FileEntry, put: Callable[[], None]) -> None:
        """Notes what the file is to be, then has it put in its place."""
        if self._entry(name) == entry and self.exists(name):
            return
        self._may_change(name)
        target = self.path(name)
        try:
            self.store.filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            if is_item := name != RECORD and not is_hidden(name):
                self._written.about_to(name, entry)
            put()
        except OSError as error:
            raise unwritten(target, error) from None
        self._checked.wrote(target, entry)
        if is_item:
            self._written.done(name, entry)

    def write_json(self, name: str, value: object) -> None:
        self.write(name, json.dumps(value, indent=1).encode())

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        """One safetensors file. In a local store it is written from where the tensors are, and is never whole in memory."""
        given, about = {k: v.contiguous() for k, v in tensors.items()}, dict(metadata or {})
        if not self.store.is_local:
            self.write(name, tensors_as_bytes(given, about))
            return
        if self._lease is not None:
            self._lease.check_seen()  # before gigabytes are written
        with tensors_beside(Path(self.path(name)), given, about) as (file, entry):
            self._put(name, entry, partial(scratch.put, file, Path(self.path(name))))

    def remove(self, name: str) -> None:
        """Forgets a file, if it is there."""
        if self.exists(name):
            self._may_change(name)
            self.store.filesystem.rm(self.path(name), recursive=True)
            self._written.forget(name)

    def folder_to_publish(self, name: str) -> AbstractContextManager[Path]:
        """A local folder to fill; it appears as `name` when the block ends without an error, as a whole.

        Where a whole one is there already it stays, and ours is thrown away: the same key means the same content. What processes that
        were killed left behind while they did the same is cleared away.
        """

        def may_publish() -> bool:
            self._check_lease()
            record = self.record()
            return not (record and any(file.startswith(f"{name}/") for file in record.files))

        return publish.folder_to_publish(self.store, self.url, name, may_publish)

    def _may_change(self, name: str) -> None:
        if self._lease is not None:
            self._lease.check_seen()
        record = self.record()
        if record and any(file == name or file.startswith(f"{name}/") for file in record.files):
            raise StoreError("store", f"{self.path(name)} belongs to a finished artifact", "these are never changed")

    # finishing, damage, leases

    def finish(self, facts: Mapping[str, Any], drop: Iterable[str] = ()) -> None:
        """Writes the record: from now on the artifact is complete. Does nothing where it is already.

        Files of which nobody noted what was written are read once, for their checksums. `drop`: files that only an unfinished artifact
        needs, such as checkpoints; they go when the record is written. Raises StoreError when the lease that this was done under is
        lost, Damaged when there is a record that the files do not agree with.
        """
        self._check_lease()
        if self.store.is_local:
            for folder in (Path(self.url), *(path for path in Path(self.url).glob("*/") if path.is_dir())):
                scratch.clear_abandoned(folder)
        dropped, record = set(drop), self.record(fresh=True)
        sizes = self.store.sizes(self.url)
        if record is not None:
            for problem in record.missing_or_changed(sizes):
                raise self._damaged(problem.file, problem.what)
            return
        whole = publish.published(self.store, self.url)
        listed = {file: entry for files in whole.values() for file, entry in files.items()}
        for problem in problems_of(listed, sizes):
            raise self._damaged(problem.file, problem.what)
        others = [name for name in sizes if not is_hidden(name) and name not in dropped | listed.keys() | {RECORD}]
        noted, problems = self._written.entries([name for name in self._written.names(sizes) if name in others], sizes)
        for problem in problems:
            raise self._damaged(problem.file, problem.what)
        files = listed | noted | self._checked.entries({self.path(name): name for name in others if name not in noted}, sizes)
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        seconds = round(max(0.0, time.time() - self.claim.taken_at), 3) if self.claim else None
        made = Record(self.stage, self.key, self.settings, self.inputs, dict(facts), files, tuple(sorted(whole)), at, seconds)
        self.remove(DAMAGE_SEEN)
        self.write(RECORD, made.to_json())
        self._record = made
        self._written.forget_all()
        for name in (*sorted(dropped), *(publish.list_name(folder) for folder in whole)):
            self.remove(name)

    def verify(self) -> list[Problem]:
        """Reads every file and says what is wrong; in an unfinished artifact, with what nobody noted, as far as names and forms tell."""
        sizes = self.store.sizes(self.url)
        record = self.record(fresh=True)
        if record is None:
            what = self.record_problem()
            found = [Problem(RECORD, what)] if what else []
            for files in publish.published(self.store, self.url).values():
                found += problems_of(files, sizes)
            noted = self._written.names(sizes)
            found += self._written.problems(noted)
            items = [name for name in sizes if not is_hidden(name) and name != RECORD and name not in set(noted)]
            broken = for_each(self.store, lambda name: looks_broken(self.store, self.path(name), sizes[name]), items)
            return found + [Problem(name, "is damaged (not whole)") for name, bad in zip(items, broken, strict=True) if bad]
        found = record.missing_or_changed(sizes)
        wrong = {problem.file for problem in found}
        names = [name for name in record.files if name not in wrong]
        sums = for_each(self.store, lambda name: self.store.checksum(self.path(name)), names)
        return found + [Problem(n, OTHER_CHECKSUM) for n, sha in zip(names, sums, strict=True) if sha != record.files[n].sha256]

    def discard_damage(self) -> list[str]:
        """Removes what is damaged, so that the stage makes it again and nothing else. Returns what went.

        The artifact is then unfinished; a finished one whose files are all right is finished again. Called by whoever holds the lease.
        """
        self._check_lease()
        problems, record = self.verify(), self.record()
        whole = record.published if record else publish.published(self.store, self.url)
        gone = {next((f for f in whole if p.file.startswith(f"{f}/")), p.file) for p in problems} - {RECORD}
        if problems and record:
            publish.list_again(self.store, self.url, record, gone)
            stay = {name: entry for name, entry in record.files.items() if name not in gone}
            self._written.list_again({n: e for n, e in stay.items() if n.partition("/")[0] not in record.published})
        lists = [publish.list_name(name) for name in gone if name in whole]
        # the record goes last: what is killed before it leaves an artifact that is seen to be damaged
        for name in (*sorted(gone), *lists, *([RECORD] if problems else []), DAMAGE_SEEN):
            if self.exists(name):
                self.store.filesystem.rm(self.path(name), recursive=True)
        for name in gone:
            self._written.forget(name)
        self._record, self._no_record_until = None, 0.0
        return sorted(gone)

    @contextmanager
    def lease(self, timeout_s: float | None = None, say: Callable[[str], None] = say_on_stderr) -> Iterator[Lease]:
        """Holds this artifact while the block runs: no other run works on it. Waits for the run that does, and tells `say` so.

        Look at `state()` again inside: the other run may have finished it. Raises StoreError after `timeout_s`.
        """
        with held(Lease(self.store, self.name, say), timeout_s) as mine:
            self._lease, self.claim, self._no_record_until = mine, mine.claim, 0.0
            try:
                yield mine
            finally:
                self._lease = self.claim = None
                if mine.lost is None and self.finished:
                    self._tidy()

    def _check_lease(self) -> None:
        """Raises StoreError when the lease that this is done under, here or in another process, is lost."""
        if self._lease is not None:
            self._lease.check()
        elif self.claim is not None:
            reason = reason_lost(self.store, self.claim)
            if reason:
                problem = f"the run that works on {self.name} lost it: {reason}"
                raise StoreError("store", problem, "run the same command again: what the other run finished is reused")

    def _tidy(self) -> None:
        """Nobody else works here and the artifact is finished: nothing hidden is needed any more."""
        for name in self.store.names(self.url):
            if name.startswith("."):
                with suppress(OSError):
                    self.store.filesystem.rm(self.path(name), recursive=True)
