"""What a drill does to a run: it kills, stops, fills, cuts off or damages something, and puts right what a person would."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

WORKERS = {
    "library": ("ray::BlockTrainer", "ray::ParentShard"),
    "profile": ("ray::Profiler",),
    "scores": ("ray::ParentShard",),
    "gkd": ("ray::RayTrainWorker", "ray::_RayTrainWorker", "ray::train_fn", "ray::TrainWorker"),
}
STRAGGLES_S, SLOWER, BEAT_S = 15.0, 10, 0.2
UNREACHABLE_S = 20.0
NOTICE_S = 5  # between a node's notice and its end


def below(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def workers(stage: str, pids: list[int]) -> list[psutil.Process]:
    """Processes of a stage's actors below these."""
    found = [process for pid in pids for process in below(pid)]
    return [process for process in found if title(process).startswith(WORKERS[stage])]


def kill_worker(stage: str, pids: list[int], rng: random.Random) -> str:
    found = workers(stage, pids)
    if not found:
        return ""
    chosen = rng.choice(found)
    words = title(chosen).split()[0]
    chosen.kill()
    return words


def kill_named(pid: int, name: str) -> str:
    for process in below(pid):
        with suppress(psutil.Error):
            if process.name() == name:
                process.kill()
                return name
    return ""


def straggle(stage: str, pids: list[int], rng: random.Random) -> str:
    """One worker gets a tenth of its time, for `STRAGGLES_S`."""
    found = workers(stage, pids)
    if not found:
        return ""
    chosen = rng.choice(found)
    words = title(chosen).split()[0]

    def slow_down() -> None:
        until = time.monotonic() + STRAGGLES_S
        with suppress(psutil.Error):
            while time.monotonic() < until:
                chosen.suspend()
                time.sleep(BEAT_S * (SLOWER - 1) / SLOWER)
                chosen.resume()
                time.sleep(BEAT_S / SLOWER)

    threading.Thread(target=slow_down, daemon=True).start()
    return words


def fill_disk(folder: Path) -> Callable[[], None]:
    """Takes what is left of a folder's disk; returns what frees it."""
    ballast = folder / "ballast"
    with suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(b"\0" * 4096)
            file.flush()
    return lambda: ballast.unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A disk of so many MiB at a folder. Needs the right to mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def flip_bit(fs: Any, root: str, stage: str, rng: random.Random) -> str:
    """One bit of the largest file of a finished artifact, behind its header."""
    (folder,) = [name for name in _names(fs, root) if name.startswith(f"{stage}-")]
    files = [path for path in fs.find(f"{root}/{folder}") if path.endswith((".safetensors", ".arrow"))]
    path = max(files, key=lambda path: (fs.size(path), path))
    data = bytearray(fs.cat_file(path))
    data[rng.randrange(len(data) * 3 // 4, len(data))] ^= 1 << rng.randrange(8)
    fs.pipe_file(path, bytes(data))
    return f"{folder}/{path.rpartition('/')[2]}"


def _names(fs: Any, root: str) -> list[str]:
    return sorted(path.rstrip("/").rpartition("/")[2] for path in fs.ls(root, detail=False))


class S3Server:
    """An S3 server in a process of its own, which can be stopped for a while."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-c", "from moto.server import main; import sys; main(sys.argv[1:])"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([*command, "-H", "127.0.0.1", "-p", str(port)], **quiet)  # type: ignore[call-overload]
        os.environ.update(
            AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x", AWS_ENDPOINT_URL=self.url, AWS_DEFAULT_REGION="us-east-1"
        )

    def away(self) -> str:
        """Answers nobody for `UNREACHABLE_S`."""
        self.process.send_signal(signal.SIGSTOP)
        threading.Timer(UNREACHABLE_S, lambda: self.process.send_signal(signal.SIGCONT)).start()
        return f"no answer for {UNREACHABLE_S:g} s"

    def close(self) -> None:
        self.process.kill()
        self.process.wait(30)


class Nodes:
    """A Ray cluster of several nodes on this machine: a head without CPUs, and nodes that can be killed."""

    def __init__(self, count: int, store_mib: int) -> None:
        from ray.cluster_utils import Cluster

        quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 4}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": quick | {"health_check_timeout_ms": 1000}}
        self.cluster, self.store_mib = Cluster(initialize_head=True, head_node_args=head), store_mib
        self.nodes: list[Any] = []
        self.fill(count)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def fill(self, count: int) -> None:
        """Nodes up to `count`."""
        while len(self.nodes) < count:
            self.nodes.append(self.cluster.add_node(num_cpus=2, object_store_memory=self.store_mib << 20))

    @property
    def pids(self) -> list[int]:
        return [node.all_processes["raylet"][0].process.pid for node in self.nodes]

    def _busy(self, stage: str, rng: random.Random) -> Any:
        """A node on which the stage works; None where there is none."""
        busy = [node for node, pid in zip(self.nodes, self.pids, strict=True) if workers(stage, [pid])]
        return rng.choice(busy) if busy else None

    def kill_one(self, stage: str, rng: random.Random) -> str:
        """A node on which the stage works: the raylet and all below it."""
        node = self._busy(stage, rng)
        if node is None:
            return ""
        self._kill(node)
        return "a node with its workers"

    def drain_one(self, stage: str, rng: random.Random) -> str:
        """A node on which the stage works is announced to go, as a preemption is, and goes when its time is over."""
        node = self._busy(stage, rng)
        if node is None:
            return ""
        ray = str(Path(sys.executable).with_name("ray"))
        words = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a drill"]
        words += ["--deadline-remaining-seconds", str(NOTICE_S), "--node-id", node.node_id, "--address", self.address]
        subprocess.run([ray, "drain-node", *words], check=True, capture_output=True, timeout=60)
        time.sleep(NOTICE_S)
        still = bool(workers(stage, [node.all_processes["raylet"][0].process.pid]))
        self._kill(node)
        return f"a node is drained and goes {NOTICE_S} s later, {'with' if still else 'without'} its workers"

    def _kill(self, node: Any) -> None:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in (raylet, *raylet.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        self.fill(len(self.nodes) + 1)  # an autoscaler would bring another

    def close(self) -> None:
        self.cluster.shutdown()


FILLER = """
import sys, time, numpy as np, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
share, found = float(sys.argv[2]), []
for node in [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]:
    @ray.remote(num_cpus=0, scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
    def fill(size):
        return np.ones(size, np.uint8)
    found.append(fill.remote(int(share * node["Resources"]["object_store_memory"])))
ray.wait(found, num_returns=len(found), timeout=60)
print("filled", flush=True)
time.sleep(600)
"""


def fill_object_stores(address: str, share: float) -> Callable[[], None]:
    """So much of every node's object store is taken by another driver; returns what frees it."""
    words = [sys.executable, "-c", FILLER, address, str(share)]
    filler = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert filler.stdout is not None
    if filler.stdout.readline().strip() != "filled":
        filler.kill()
        raise RuntimeError("the object stores could not be filled")

    def free() -> None:
        filler.kill()
        filler.wait(30)

    return free
