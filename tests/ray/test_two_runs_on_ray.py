"""Two runs of the command line at once on one store, each with a Ray of its own: every stage is done by one of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import SMALL, save_parent_with_text

from puzzle_ray.store import Store
from puzzle_ray.store.lease import leases
from puzzle_ray.store.upkeep import artifacts, verify

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parents[1] / "recorded_run.py"


@pytest.mark.wide  # tests/unit/test_two_runs.py has it of whole runs, on folders and S3, without Ray
def test_two_libraries_at_once_are_built_once(tmp_path):
    parent, text = save_parent_with_text(tmp_path / "parent")
    store = Store(str(tmp_path / "store"))
    settings = SMALL | {"parent": str(parent), "data.train": str(text), "store": store.root, "cluster.num_shards": 1}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    command = [sys.executable, str(SCRIPT), str(tmp_path / "log"), "build-library", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    try:
        ended = [run.communicate(timeout=900) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], ended
    said = [dict(re.findall(r"^\[(\w+)\] (.+?): /", err, flags=re.MULTILINE)) for _, err in ended]
    for stage in ("tokens", "library"):
        assert sorted(words[stage] == "already there" for words in said) == [False, True], said
    records = [
        line.split("/")[0].split()[1] for line in (tmp_path / "log").read_text().splitlines() if line.endswith("artifact.json")
    ]
    assert len(records) == len(set(records))
    assert {listed.stage: listed.state for listed in artifacts(store)} == {"tokens": "finished", "library": "finished"}
    assert not any(verify(store).values()) and not leases(store)
