"""Text to token shards, in bounded memory and in parallel: python -m benchmarks.tokens --shared DATA --out FILE.json [--quick]

The text is made of the books in DATA/gutenberg: paragraphs of all of them in an order that a seed draws, again with the next seed, until
there is as much as asked for (`--megabytes`), in documents of about 4,000 characters; the tokenizer is that of DATA/gutenberg7m. Every
run is a process of its own that tokenises all of it on Ray, on this machine, as the tokens stage does.

- `one`, `two`: one worker and two. `wall_s` is from the first block's end to the last one's, in blocks of a sixtieth of the text; so
  starting Ray and its workers does not count. `workers_cpu_s` is the CPU time of all workers since each was first seen at a block; so is
  `reader_cpu_s`, which is less than it took: it is quick, and seldom seen.
- `killed`, `resumed`: two workers in blocks as large as the product's; killed with all of its processes (SIGKILL) when half of the shards
  are there, then run again in the same store. `resumed_equal`: the train tokens have the content hash of those of `one`.

Twice a second the private memory (resident less shared) of every process of a run is read; `peak_process_mib` is the highest of any in
any run. `two_over_one` is the rate of `two` over that of `one` by wall time. `two_over_one_cpu` is what it comes to where every process has
a core of its own: the CPU time of the one worker over that of the busier of the reader and a worker with half of what the two took. On a
machine that others use, too, wall time says little.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import write

DOCUMENT_CHARACTERS = 4000
BLOCKS = 60
MIB = 1 << 20


def make_text(books: Path, file: Path, megabytes: float) -> int:
    """Documents of drawn paragraphs. Returns their bytes."""
    paragraphs = [p for book in sorted(books.glob("*.txt")) for p in re.split(r"\n\s*\n", book.read_text()) if p.strip()]
    size = seed = 0
    with file.open("w") as out:
        while size < megabytes * 1e6:
            drawn = list(paragraphs)
            random.Random(seed).shuffle(drawn)
            document: list[str] = []
            held = 0
            for paragraph in drawn:
                document.append(paragraph)
                held += len(paragraph)
                if held >= DOCUMENT_CHARACTERS:
                    size += out.write(json.dumps({"text": "\n\n".join(document)}, ensure_ascii=False) + "\n")
                    document, held = [], 0
                    if size >= megabytes * 1e6:
                        break
            seed += 1
    return file.stat().st_size


def tokenise(parent: str, text: str, store: str, workers: int, block_characters: int) -> None:
    """In this process and those below it. Prints what the record says."""
    from actors.data_plane import text_bytes
    from jobs.session import connected
    from puzzle_ray.cluster import ClusterConfig
    from puzzle_ray.data import blocks
    from puzzle_ray.data.settings import DataConfig
    from puzzle_ray.data.splits import write_tokens
    from puzzle_ray.models.child import read_config
    from puzzle_ray.store import Store

    blocks.BLOCK_CHARACTERS = block_characters or blocks.BLOCK_CHARACTERS
    config = DataConfig(train=text, max_train_tokens=10**10, max_heldout_tokens=10**9, tokenise_workers=workers)
    vocab_size, cluster = read_config(Path(parent)).vocab_size, ClusterConfig()
    with connected(cluster, text_bytes(config, workers)):
        from actors.tokenisers import OnRay, ParentTokenizer

        artifact = Store(store).artifact("tokens", {"data": config.identity()}, {})
        with artifact.lease(), closing(OnRay(ParentTokenizer(parent), artifact, vocab_size, cluster, workers)) as on_ray:
            write_tokens(config, None, artifact, on_ray, on_ray.train_hash)
        print(json.dumps(artifact.facts()))


class Processes(threading.Thread):
    """A process and all below it: private memory and CPU time of each, by pid, and the highest of them by kind."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root, self.ended = psutil.Process(pid), threading.Event()
        self.peak: dict[str, int] = defaultdict(int)
        self.before: dict[tuple[str, int], float] = {}  # CPU seconds when it began to work
        self.cpu: dict[tuple[str, int], float] = {}

    def run(self) -> None:
        while not self.ended.wait(0.5):
            for process in [self.root, *_below(self.root)]:
                try:
                    memory, words = process.memory_info(), " ".join(process.cmdline()[:1])
                    times = process.cpu_times()
                except psutil.Error:
                    continue
                kinds = {"BlockTokeniser": "worker", "TextReader": "reader"}
                kind = next(
                    (kind for name, kind in kinds.items() if name in words), "driver" if process == self.root else "other"
                )
                self.peak[kind] = max(self.peak[kind], memory.rss - memory.shared)
                if kind in kinds.values() and words.endswith((".tokenise", ".block")):
                    self.before.setdefault((kind, process.pid), times.user + times.system)
                self.cpu[kind, process.pid] = times.user + times.system

    def worked(self, kind: str) -> float:
        """CPU seconds of all processes of a kind since each began to work."""
        return sum(seconds - self.before.get(key, seconds) for key, seconds in self.cpu.items() if key[0] == kind)


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def shards(store: Path) -> list[Path]:
    """Of training text, or of all text where it is in few documents, by the time that they were written."""
    found = [path for folder in ("train", "all") for path in store.glob(f"tokens-*/{folder}/*.arrow")]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def watched(name: str, words: list[str], store: Path, kill_at: int = 0) -> dict[str, Any]:
    """One run; with `kill_at`, it is killed once so many shards are there."""
    started = time.monotonic()
    here = [sys.executable, "-m", "benchmarks.tokens", "--store", str(store), *words]
    process = subprocess.Popen(here, stdout=subprocess.PIPE, text=True, start_new_session=True)
    processes = Processes(process.pid)
    processes.start()
    killed = 0
    while kill_at and process.poll() is None:
        if len(shards(store)) >= kill_at:
            family = _below(processes.root)
            os.killpg(process.pid, signal.SIGKILL)
            for child in family:
                if child.is_running():
                    child.kill()
            killed = len(shards(store))
            break
        time.sleep(0.05)
    out, _ = process.communicate()
    processes.ended.set()
    processes.join()
    if process.returncode and not killed:
        raise SystemExit(f"{name} ended with {process.returncode}")
    found = {"run": name, "all_s": time.monotonic() - started, "shards": len(shards(store))}
    found |= {f"{kind}_peak_mib": peak / MIB for kind, peak in processes.peak.items()}
    found |= {"workers_cpu_s": processes.worked("worker"), "reader_cpu_s": processes.worked("reader"), "load": os.getloadavg()[0]}
    facts = json.loads(out.splitlines()[-1]) if not killed else {}
    return found | {name: facts.get(name) for name in ("train_tokens", "heldout_tokens", "train_sha256")}


def rate(row: dict[str, Any], store: Path, workers: int) -> None:
    """Adds the seconds between the end of the first round of blocks and that of the last block, and blocks per second."""
    times = [path.stat().st_mtime for path in shards(store)]
    row["wall_s"] = times[-1] - times[workers - 1]
    row["blocks_per_s"] = (len(times) - workers) / row["wall_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shared", help="a folder with gutenberg/ and gutenberg7m/")
    parser.add_argument("--out")
    parser.add_argument("--megabytes", type=float, default=1000.0)
    parser.add_argument("--quick", action="store_true", help="3 MB: a check that it runs")
    parser.add_argument("--store", help=argparse.SUPPRESS)  # a run of its own
    parser.add_argument("--parent", help=argparse.SUPPRESS)
    parser.add_argument("--text", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--block-characters", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.store:
        tokenise(arguments.parent, arguments.text, arguments.store, arguments.workers, arguments.block_characters)
        return
    if not arguments.shared or not arguments.out:
        parser.error("--shared and --out are needed")
    shared, megabytes = Path(arguments.shared).absolute(), 3.0 if arguments.quick else arguments.megabytes
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.jsonl"
        size = make_text(shared / "gutenberg", text, megabytes)
        common = ["--parent", str(shared / "gutenberg7m"), "--text", str(text)]
        small = ["--block-characters", str(size // BLOCKS)]
        large = ["--block-characters", str(size // 8)] if arguments.quick else []
        rows = []
        for name, workers in (("one", 1), ("two", 2)):
            store = Path(scratch) / name
            rows.append(watched(name, [*common, *small, "--workers", str(workers)], store))
            rate(rows[-1], store, workers)
            shutil.rmtree(store)
        store, words = Path(scratch) / "again", [*common, *large, "--workers", "2"]
        half = max(2, size // (size // 8 if arguments.quick else 16_000_000) // 2)
        rows.append(watched("killed", words, store, half))
        rows.append(watched("resumed", words, store))
    for row in rows:
        print("  ".join(f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()))
    one, two, killed, resumed = rows
    summary = {
        "megabytes": size / 1e6,
        "tokens": one["train_tokens"] + one["heldout_tokens"],
        "peak_process_mib": max(value for row in rows for name, value in row.items() if name.endswith("_peak_mib")),
        "two_over_one": two["blocks_per_s"] / one["blocks_per_s"],
        "two_over_one_cpu": one["workers_cpu_s"] / max(two["workers_cpu_s"] / 2, two["reader_cpu_s"]),
        "megabytes_per_cpu_s": size / 1e6 / one["workers_cpu_s"],
        "shards_when_killed": killed["shards"],
        "resumed_equal": resumed["train_sha256"] == one["train_sha256"] == two["train_sha256"],
    }
    for word, value in summary.items():
        print(f"{word:20} {value}")
    write(arguments.out, rows, summary)


if __name__ == "__main__":
    main()
