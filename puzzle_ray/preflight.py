"""Whether the nodes of a cluster can work on one run together: what is looked at on each of them, and what follows. Without Ray."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from platform import python_version

from puzzle_ray.errors import ClusterError
from puzzle_ray.store.root import Root

COMPARED = ("ray", "torch", "transformers")  # as their distributions are called
SOURCES = (".py", ".yaml")
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")  # Ray hides GPUs from who is given none
COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
COUNT_TIMEOUT_S = 120.0
DRIVER = "driver"
NAMED = 4  # nodes in one line, at most
GIB = 1 << 30


@dataclass(frozen=True)
class Question:
    """What every node is asked. The driver has written `nonce` into the file `driver` of `folder`, which lies in `store`.

    `packages` are those that the driver runs from. `parent` is a folder, or None where every node fetches the parent itself.
    """

    store: str
    folder: str
    nonce: str
    packages: tuple[str, ...]
    parent: str | None
    count_gpus: bool


@dataclass(frozen=True)
class Answer:
    """What one node sees. `store_problem` is empty where it reads what the driver wrote and can write.

    `parent` identifies the parent's files, and is empty where they are not there. `num_gpus` is what torch sees.
    """

    versions: Mapping[str, str]
    source: str
    store_problem: str
    parent: str
    num_gpus: int
    shm_free_bytes: int | None


@dataclass(frozen=True)
class Node:
    """One node: what it answered, what Ray believes of it, and whether the driver sees what it wrote into the store."""

    name: str
    answer: Answer
    seen: bool
    gpus: float
    object_store_bytes: int


def look(question: Question, name: str) -> Answer:
    """Looks at the machine and process that it runs in, and writes the file `name` beside the driver's."""
    return Answer(
        versions={"python": python_version(), **{package: _version(package) for package in COMPARED}},
        source=source_hash(question.packages),
        store_problem=_store_problem(question, name),
        parent=parent_files(question.parent) if question.parent else "",
        num_gpus=_gpus_of_torch() if question.count_gpus else 0,
        shm_free_bytes=shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None,
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package).partition("+")[0]  # 2.13.0+cpu and 2.13.0+cu128 go together
    except metadata.PackageNotFoundError:
        return "none"


def source_hash(packages: Iterable[str]) -> str:
    """Identifies the sources of packages as this process would import them."""
    digest = hashlib.sha256()
    for package in packages:
        spec = util.find_spec(package)
        for place in spec.submodule_search_locations or () if spec else ():
            for path in sorted(Path(place).rglob("*")):
                if path.suffix in SOURCES:
                    digest.update(f"{package} {path.relative_to(place).as_posix()} {path.stat().st_size}\n".encode())
                    digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def parent_files(folder: str) -> str:
    """Identifies a model's folder by its config and the sizes of its weights; empty where there is none."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        return ""
    sizes = [(file.name, file.stat().st_size) for file in sorted(path.glob("*.safetensors"))]
    return hashlib.sha256((path / "config.json").read_bytes() + repr(sizes).encode()).hexdigest()[:12]


def _store_problem(question: Question, name: str) -> str:
    try:
        filesystem = Root(question.store).filesystem
        try:
            found = bytes(filesystem.cat_file(f"{question.folder}/{DRIVER}"))
        except FileNotFoundError:
            return "does not hold what the driver wrote"
        if found != question.nonce.encode():
            return "holds something else than the driver wrote"
        filesystem.pipe_file(f"{question.folder}/{name}", found)
    except Exception as error:  # every backend has errors of its own
        reason = (str(error).strip().splitlines() or [""])[0]
        return f"cannot be used ({type(error).__name__}: {reason})"
    return ""


def _gpus_of_torch() -> int:
    """In a process of its own: Ray hides GPUs from this one, and torch would remember that."""
    environment = {name: value for name, value in os.environ.items() if name not in VISIBLE}
    command = [sys.executable, "-c", COUNT_GPUS]
    try:
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COUNT_TIMEOUT_S)
        return int(found.stdout.split()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return 0


def compare(driver: Answer, nodes: Sequence[Node], question: Question) -> list[str]:
    """What is worth a warning, one line each. Raises ClusterError for what would stop the run or mix its results."""
    _check_store(nodes, question.store)
    _check_sources(driver, nodes)
    warnings = _check_versions(driver, nodes)
    if question.parent is not None:
        _check_parent(driver, nodes, question.parent)
    if question.count_gpus:
        _check_gpus(nodes)
    return warnings + _small_shm(nodes)


def named(nodes: Iterable[str]) -> str:
    """`node a`, `nodes a, b`; of many the first few."""
    listed = sorted(nodes)
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ("node " if len(listed) == 1 else "nodes ") + ", ".join(listed[:NAMED]) + more


def _check_store(nodes: Sequence[Node], store: str) -> None:
    problems: dict[str, list[str]] = defaultdict(list)
    for node in nodes:
        problem = node.answer.store_problem or ("" if node.seen else "does not show the driver what is written there")
        if problem:
            problems[problem].append(node.name)
    for problem, names in problems.items():
        remedy = "name a folder that all nodes share, or a URL such as s3://bucket/runs, that every node may read and write"
        raise ClusterError("store", f"{store!r} {problem} on {named(names)}", remedy)


def _check_sources(driver: Answer, nodes: Sequence[Node]) -> None:
    others = [node.name for node in nodes if node.answer.source != driver.source]
    if others:
        remedy = "install the same there, or let `ray job submit --working-dir` bring it"
        raise ClusterError("cluster", f"another puzzle_ray than the driver's is on {named(others)}", remedy)


def _check_versions(driver: Answer, nodes: Sequence[Node]) -> list[str]:
    """Raises ClusterError where the first two numbers differ; a warning for other differences."""
    warnings = []
    for package, wanted in driver.versions.items():
        others: dict[str, list[str]] = defaultdict(list)
        for node in nodes:
            if node.answer.versions[package] != wanted:
                others[node.answer.versions[package]].append(node.name)
        for version, names in sorted(others.items()):
            words = f"{package} {version} is on {named(names)}, and {wanted} where the driver runs"
            if version.split(".")[:2] != wanted.split(".")[:2]:
                raise ClusterError("cluster", words, "install one version on all nodes: results of several would mix")
            warnings.append(words)
    return warnings


def _check_parent(driver: Answer, nodes: Sequence[Node], parent: str) -> None:
    remedy = "put it into a folder that all nodes share, or name a URL or a hub id"
    missing = [node.name for node in nodes if not node.answer.parent]
    if missing:
        raise ClusterError("parent", f"{parent!r} is not on {named(missing)}", remedy)
    others = [node.name for node in nodes if node.answer.parent != driver.parent]
    if others:
        raise ClusterError("parent", f"{parent!r} holds other files on {named(others)} than where the driver runs", remedy)


def _check_gpus(nodes: Sequence[Node]) -> None:
    fewer = {node.name: f"{node.answer.num_gpus} of {node.gpus:g}" for node in nodes if node.answer.num_gpus < node.gpus}
    if fewer:
        first = sorted(fewer)[0]
        problem = f"torch sees fewer GPUs than Ray gives out on {named(fewer)} ({fewer[first]} on {first})"
        raise ClusterError("cluster", problem, "install a CUDA build of torch and a driver there, or ask for no GPUs")


def _small_shm(nodes: Sequence[Node]) -> list[str]:
    return [
        f"/dev/shm of {named([node.name])} has {node.answer.shm_free_bytes / GIB:.2f} GiB free, and its object store may take "
        f"{node.object_store_bytes / GIB:.2f} GiB: Ray puts on disk what does not fit, which is slow; "
        "give it a bigger /dev/shm (docker run --shm-size)"
        for node in nodes
        if node.answer.shm_free_bytes is not None and node.answer.shm_free_bytes < node.object_store_bytes
    ]
