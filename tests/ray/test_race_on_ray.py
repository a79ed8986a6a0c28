"""A race on Ray is the one in one process, row for row, and stage `gkd` goes on from where its winner is."""

from __future__ import annotations

import json

import pytest
from small_runs import SMALL, save_parent_with_text

from jobs.run import Run
from jobs.stages import architecture
from puzzle_ray.config import validated
from puzzle_ray.distill.gkd import CURVE, LOOKS, steps_saved
from puzzle_ray.pipeline import (
    Setting,
    architecture_of,
    child_of,
    distilled_of,
    library_of,
    profile_of,
    scores_of,
    tokens_of,
)
from puzzle_ray.progress import Quiet
from puzzle_ray.search.pick import PICKED
from puzzle_ray.store import Store


def config_of(parent_with_text, store, **search):
    folder, text = parent_with_text
    limits = {"speedup": None, "params_fraction": 0.8}  # bytes decide, no measured time
    values = SMALL | {
        "parent": str(folder),
        "data": {"train": str(text), "sequence_length": 16},
        "store": str(store),
        "scoring": SMALL["scoring"] | {"shortlist": "none"},
        "search": {"limits": limits, "measure_tokens": 128, "sweep": {"speedup": None, "params_fraction": [0.8]}} | search,
        "profile": SMALL["profile"] | {"engine": "roofline", "device": "H100"},
        "gkd": {"tokens": 18 * 64, "micro_batch_tokens": 32, "num_workers": 2, "learning_rate": 1e-3, "checkpoint_every": 50},
        "cluster": {"num_shards": 1},
    }
    return validated(json.loads(json.dumps(values)))


RACE = {"candidates": 4, "rivals": ["greedy"], "race_rungs": 3, "race_own": 4, "race_within": 100.0}


@pytest.mark.wide
def test_a_race_on_ray_is_that_of_one_process_and_its_winner_is_distilled_on(local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr("puzzle_ray.pipeline.num_cores", lambda: 4)  # as that Ray has: GKD's bits depend on its threads
    parent = save_parent_with_text(tmp_path / "parent")
    on_ray = Run(config_of(parent, tmp_path / "on_ray", **RACE), Quiet())
    on_ray.done("architecture")
    s = Setting(config_of(parent, tmp_path / "serial", **RACE), Store(str(tmp_path / "serial")), Quiet())
    tokens, profile = tokens_of(s), profile_of(s)
    library = library_of(s, tokens)
    found = architecture_of(s, tokens, library, profile, scores_of(s, tokens, library))
    assert found.key == on_ray.content("architecture").key
    report, other = found.read_json(PICKED), architecture.measurements(on_ray)
    assert report["race"] == other["race"] and report["picked"] == other["picked"]
    rungs = sorted([[row["step"] for row in each["rungs"]] for each in report["race"]], key=len)
    assert rungs == [[2], [2], [2, 6], [2, 6]], "four began, and the two of the best third went on to the second rung"

    distilled = on_ray.artifact("gkd")
    assert steps_saved(distilled) == 6 and not distilled.finished, "the winner waits in its own stage"
    on_ray.done("gkd")
    here = distilled_of(s, tokens, child_of(s, library, found))
    alone = Setting(config_of(parent, tmp_path / "alone", candidates=1), Store(str(tmp_path / "alone")), Quiet())
    tokens = tokens_of(alone)
    child = alone.store.artifact("child", {}, on_ray.content("child").inputs)
    with child.folder_to_publish("child") as folder:
        for file in on_ray.content("child").local_folder("child").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    child.finish({})
    never_waited = distilled_of(alone, tokens, child)
    assert distilled.key == here.key == never_waited.key
    for name in (CURVE, LOOKS, "child/model.safetensors"):
        assert distilled.read(name) == here.read(name) == never_waited.read(name), name
