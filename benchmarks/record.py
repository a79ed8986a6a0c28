"""What every benchmark writes: rows, a summary, and the machine they were taken on."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from puzzle_ray.process import num_cores

PACKAGES = ("ray", "torch", "transformers", "numpy", "mip", "highspy", "pydantic", "safetensors", "datasets")


def machine() -> dict[str, Any]:
    """The commit (with `+changes` where the tree differs from it), versions, cores, memory and GPU."""
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "cores": num_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": platform.platform(),
        "gpu": _gpu(),
    }


def write(out: str | Path, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Writes `{rows, summary, machine}` as JSON; an existing file is replaced at once."""
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    record = {"rows": list(rows), "summary": dict(summary), "machine": machine()}
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def _command(*words: str) -> str | None:
    """A command's output, or None where it is missing or fails."""
    if shutil.which(words[0]) is None:
        return None
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> str | None:
    commit = _command("git", "rev-parse", "HEAD")
    return commit + "+changes" if commit and _command("git", "status", "--porcelain") else commit


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> str | None:
    return _command("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader") or None
