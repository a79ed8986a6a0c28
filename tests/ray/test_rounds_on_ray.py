"""Two rounds on Ray give what they give in one process, under the same keys; a run that was broken off between them goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import SMALL, save_parent_with_text

from jobs.run import Run
from jobs.stages import evaluation
from jobs.status import rows
from puzzle_ray.config import validated
from puzzle_ray.pipeline import Setting
from puzzle_ray.pipeline import run as run_serially
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store

STAGES = ("tokens", "profile", "library", "scores", "architecture", "child", "gkd")


def config_of(parent_with_text, store):
    folder, text = parent_with_text
    limits = {"speedup": None, "params_fraction": 0.8}  # bytes decide, no measured time
    values = SMALL | {
        "rounds": 2,
        "parent": str(folder),
        "data": {"train": str(text), "sequence_length": 16},
        "store": str(store),
        "scoring": SMALL["scoring"] | {"shortlist": "none"},
        "search": {"limits": limits, "sweep": {"speedup": None, "params_fraction": [0.8]}},
        "profile": SMALL["profile"] | {"engine": "roofline", "device": "H100"},
        "cluster": {"num_shards": 1},
    }
    return validated(json.loads(json.dumps(values)))


def keys(store):
    return {path.parent.name for stage in STAGES for path in store.glob(f"{stage}-*/artifact.json")}


@pytest.mark.wide
def test_rounds_on_ray_are_rounds_in_one_process(local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr("puzzle_ray.pipeline.num_cores", lambda: 4)  # as that Ray has: GKD's bits depend on its threads
    parent = save_parent_with_text(tmp_path / "parent")
    first = Run(config_of(parent, tmp_path / "on_ray"), Quiet())
    first.done("gkd")
    states = {row.stage: row.state for row in rows(Run(first.config, Quiet()))}
    assert states["1 gkd"] == "finished" and states["2 library"] == states["2 report"] == "to do" and "2 tokens" not in states
    again = Run(first.config, Quiet())
    last = again.last_round()
    assert (last.number, last.original) == (2, again)
    last.done("gkd", "evaluation")
    found = run_serially(Setting(config_of(parent, tmp_path / "serial"), Store(str(tmp_path / "serial")), Quiet()))
    assert keys(tmp_path / "on_ray") == keys(tmp_path / "serial")
    child = last.content("gkd").local_folder("child")
    assert (child / "model.safetensors").read_bytes() == Path(found.child, "model.safetensors").read_bytes()
    assert evaluation.read(last)["models"]["child"]["kl"] == found.evaluation["models"]["child"]["kl"]
    assert {row.stage: row.state for row in rows(Run(first.config, Quiet()))}["2 gkd"] == "finished"
