"""The pick among distilled candidates on Ray is the one in one process, under the same keys."""

from __future__ import annotations

import json

import pytest
from small_runs import SMALL, save_parent_with_text

from jobs.run import Run
from jobs.stages import architecture
from puzzle_ray.config import validated
from puzzle_ray.pipeline import Setting, architecture_of, library_of, profile_of, read_architecture, scores_of, tokens_of
from puzzle_ray.progress import Quiet
from puzzle_ray.search.pick import PICKED
from puzzle_ray.store import Store


def config_of(parent_with_text, store):
    folder, text = parent_with_text
    limits = {"speedup": None, "params_fraction": 0.8}  # bytes decide, no measured time
    search = {"limits": limits, "candidates": 2, "measure_tokens": 128, "distil_tokens": 256, "without": ["noop"], "rivals": []}
    values = SMALL | {
        "parent": str(folder),
        "data": {"train": str(text), "sequence_length": 16},
        "store": str(store),
        "scoring": SMALL["scoring"] | {"shortlist": "none"},
        "search": search | {"sweep": {"speedup": None, "params_fraction": [0.8]}},
        "profile": SMALL["profile"] | {"engine": "roofline", "device": "H100"},
        "cluster": {"num_shards": 1},
    }
    return validated(json.loads(json.dumps(values)))


@pytest.mark.wide
def test_candidates_distilled_on_ray_are_those_distilled_in_one_process(local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr("puzzle_ray.pipeline.num_cores", lambda: 4)  # as that Ray has: GKD's bits depend on its threads
    parent = save_parent_with_text(tmp_path / "parent")
    on_ray = Run(config_of(parent, tmp_path / "on_ray"), Quiet())
    on_ray.done("architecture")
    serial = Setting(config_of(parent, tmp_path / "serial"), Store(str(tmp_path / "serial")), Quiet())
    tokens, profile = tokens_of(serial), profile_of(serial)
    library = library_of(serial, tokens)
    found = architecture_of(serial, tokens, library, profile, scores_of(serial, tokens, library))
    assert found.key == on_ray.content("architecture").key
    report, other = found.read_json(PICKED), architecture.measurements(on_ray)
    assert report["picked"] == other["picked"] and report["candidates"] == other["candidates"]
    kls = [row["kl_distilled"] for row in report["candidates"]]
    assert len(kls) >= 2 and report["picked"]["kl_distilled"] == min(kls)
    assert read_architecture(found).choices == architecture.read(on_ray).choices
