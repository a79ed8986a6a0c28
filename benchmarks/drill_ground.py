"""Where drills are held: a small parent with an undisturbed run, a drill's own store, and the commands that are run there."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import yaml

from benchmarks import faults

VERBS = {"library": "build-library", "profile": "profile-blocks", "scores": "score-blocks", "gkd": "distill-child"}
BEFORE = {  # what a stage finds in the store
    "library": ("tokens",),
    "profile": ("tokens",),
    "scores": ("tokens", "library", "profile"),
    "gkd": ("tokens", "library", "profile", "scores", "architecture", "child"),
}
LIMIT_S = 300.0  # of one command


class Ground:
    """The parent, its text, the settings, and a store with an undisturbed run."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.base = folder.absolute(), folder.absolute() / "base"
        self.config = self.folder / "run.yaml"

    def prepare(self) -> None:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
        from small_models import save_parent

        parent = self.folder / "parent"
        if not parent.exists():
            save_parent(parent, num_hidden_layers=4, vocab_size=VOCAB_SIZE + 7)
            byte_tokenizer().save_pretrained(parent)
        words = random.Random(0)
        text = " ".join(words.choice(("a", "text", "of", "some", "length", "and", "more", "words")) for _ in range(30_000))
        (self.folder / "text.txt").write_text(text)
        values = SETTINGS | {"parent": str(parent)}
        values["data"] = values["data"] | {"train": str(self.folder / "text.txt")}
        self.config.write_text(yaml.safe_dump(values))
        self.run("distill-child", str(self.base), check=True)

    def command(self, verb: str, store: str, *more: str) -> list[str]:
        return [sys.executable, "-m", "jobs.app", verb, "--config", str(self.config), "--store", store, *more]

    def run(self, verb: str, store: str, *, check: bool = False) -> int:
        done = subprocess.run(self.command(verb, store), capture_output=True, text=True, timeout=LIMIT_S)
        if check and done.returncode:
            raise RuntimeError(f"the undisturbed run ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.returncode


SETTINGS: dict[str, Any] = {
    "data": {"sequence_length": 16},
    "space": {"attention": ["parent", "gqa:1", "noop"], "ffn": ["parent", "ffn:50%", "ffn:25%", "noop"]},
    "library": {
        "tokens": 12_800,
        "calibration_tokens": 256,
        "validation_tokens": 256,
        "micro_batch_tokens": 64,
        "checkpoint_every": 20,
    },
    "profile": {
        "scenario": {"batch_size": 2, "input_tokens": 16, "output_tokens": 4},
        "batch_sizes": [1, 3, 4, 6, 8],
        "repeats": 10,
        "stack": 2,
    },
    "scoring": {"tokens": 4096, "micro_batch_tokens": 64},
    "search": {"limits": {"params_fraction": 0.9}},
    "gkd": {"tokens": 6_400, "micro_batch_tokens": 64, "checkpoint_every": 20, "heldout_tokens": 256},
    "evaluate": {"tokens": 256},
    "cluster": {"num_shards": 1, "placement_timeout_s": 120, "step_timeout_s": 120},
}


class Run:
    """One command, its stderr, and how long it was silent."""

    def __init__(self, command: list[str], folder: Path, number: int) -> None:
        self.path = folder / f"stderr-{number}.txt"
        environment = {n: v for n, v in os.environ.items() if n not in ("RAY_ADDRESS", "PUZZLE_RAY_DEBUG")}
        with self.path.open("w") as stderr:
            self.process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True, env=environment
            )
        self.silence_s, self._heard, self._size, self._silent_at = 0.0, time.monotonic(), 0, 0

    def step(self) -> int | None:
        """Looks at it; its exit code, or None while it runs."""
        size, now = self.path.stat().st_size, time.monotonic()
        if size != self._size:
            self._size, self._heard = size, now
        if now - self._heard > self.silence_s:
            self.silence_s, self._silent_at = now - self._heard, size
        return self.process.poll()

    def wait(self, until: Callable[[], bool] = lambda: False, limit_s: float = LIMIT_S) -> int | None:
        """Until it has ended, or `until` holds. Raises TimeoutError, and ends it."""
        deadline = time.monotonic() + limit_s
        while self.step() is None and not until():
            if time.monotonic() > deadline:
                self.end()
                raise TimeoutError(f"nothing within {limit_s:g} s; it said last: {self.last_lines()[-1:]}")
            time.sleep(0.05)
        return self.process.poll()

    @property
    def silent_after(self) -> str:
        """The line before its longest silence."""
        said = self.path.read_bytes()[: self._silent_at].decode(errors="replace").strip()
        return said.splitlines()[-1].strip() if said else "nothing yet"

    def last_lines(self) -> list[str]:
        """What it said besides progress."""
        lines = self.path.read_text(errors="replace").splitlines()
        return [line for line in lines if line and not line.startswith(("[", "  ", "Writing"))]

    def end(self) -> None:
        """It and everything below it."""
        processes = faults.below(self.process.pid)
        for process in (self.process, *processes):
            try:
                process.kill()
            except Exception:  # it is gone
                continue
        self.process.wait(30)


class Place:
    """Where a drill's store is: a folder or a prefix on S3, with what the stage finds there."""

    def __init__(self, ground: Ground, stage: str, root: str) -> None:
        self.stage, self.root = stage, root
        self.fs, self.path = fsspec.core.url_to_fs(root, use_listings_cache=False, skip_instance_cache=True)
        if self.fs.exists(self.path):
            self.fs.rm(self.path, recursive=True)
        for folder in ground.base.iterdir():
            if folder.name.rpartition("-")[0] in BEFORE[stage]:
                for file in (f for f in folder.rglob("*") if f.is_file()):
                    target = f"{self.path}/{file.relative_to(ground.base).as_posix()}"
                    self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                    self.fs.put_file(str(file), target)
        self.earlier = self._all()

    def _all(self) -> dict[str, tuple[int, str]]:
        """Every file that is not hidden: name -> (size, when or which version)."""
        if not self.fs.exists(self.path):
            return {}
        found = {path[len(self.path) :].lstrip("/"): entry for path, entry in self.fs.find(self.path, detail=True).items()}
        shown = {name: entry for name, entry in found.items() if not any(part.startswith(".") for part in name.split("/"))}
        return {name: (entry["size"], str(entry.get("mtime") or entry.get("ETag"))) for name, entry in shown.items()}

    def earlier_done_again(self, but: str) -> list[str]:
        """Artifacts besides the stage's own, and besides those of `but`, that are not as they were before the drill."""
        changed = {name.partition("/")[0] for name, _ in self.earlier.items() ^ self._all().items()}
        stages = {name: name.rpartition("-")[0] for name in changed}  # what is no artifact, such as the log, has none
        return sorted(name for name, stage in stages.items() if stage not in ("", self.stage, but))

    def files(self) -> dict[str, tuple[int, str]]:
        """Finished pieces of the stage's artifact: name -> (size, when or which version)."""
        return {name: entry for name, entry in self._all().items() if name.startswith(f"{self.stage}-")}

    def items(self) -> dict[str, tuple[int, str]]:
        """What is never to be done again: items, and weights of finished variants; not checkpoints, which are written over."""
        return {n: v for n, v in self.files().items() if "checkpoint" not in n and n.rpartition("/")[2] != "artifact.json"}

    def begun(self) -> bool:
        """Some of it is done: two items, or a checkpoint."""
        names = list(self.files())
        return sum("/items/" in name for name in names) >= 2 or any("checkpoint" in name for name in names)

    def digest(self) -> dict[str, str]:
        return digest(self.fs, self.path, self.stage)


def digest(fs: Any, root: str, stage: str) -> dict[str, str]:
    """File -> hash of what a stage's artifact holds; of a profile the rows without their times. The record is left out."""
    folders = [p for p in fs.ls(root, detail=False) if p.rstrip("/").rpartition("/")[2].startswith(f"{stage}-")]
    found = {}
    for folder in folders:
        for path in fs.find(folder):
            name = path[len(root) :].lstrip("/")
            kept = not any(part.startswith(".") for part in name.split("/")) and not name.endswith("artifact.json")
            if kept and (stage != "profile" or name.endswith(".parquet")):
                found[name] = hashlib.sha256(_content(bytes(fs.cat_file(path)), name, stage)).hexdigest()
    return found


def _content(data: bytes, name: str, stage: str) -> bytes:
    if name.endswith(".safetensors"):
        from safetensors.numpy import load

        return b"".join(key.encode() + str(v.shape).encode() + v.tobytes() for key, v in sorted(load(data).items()))
    if name.endswith(".parquet"):
        import io

        import pyarrow.parquet as pq

        rows = pq.read_table(io.BytesIO(data)).to_pylist()
        timed = ("prefill_ms", "decode_ms", "prefill_spread_ms", "decode_spread_ms")
        return repr([{k: v for k, v in row.items() if stage != "profile" or k not in timed} for row in rows]).encode()
    return data
