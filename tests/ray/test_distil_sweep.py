"""Children of a sweep on Ray Tune: the hopeless one ends early, the others are as if distilled alone, and nothing is done twice."""

import pytest
import torch
from gkd_jobs import CHOICES, gkd_jobs

from actors.distil_sweep import distil_children
from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.distill.gkd import CHILD, CURVE, LOOKS, distill_child, steps_saved
from puzzle_ray.distill.rungs import Climber
from puzzle_ray.distill.settings import GkdConfig
from puzzle_ray.errors import ClusterError
from puzzle_ray.models.child import load_model
from puzzle_ray.progress import Quiet

CONFIG = GkdConfig(tokens=18 * 32, micro_batch_tokens=32, learning_rate=1e-3, checkpoint_every=10, heldout_looks=9)
WORSE, WORST = (LayerChoice("gqa:1", "noop"), LayerChoice("linear", "noop")), (LayerChoice("noop", "noop"),) * 2


def climbers_of(jobs, **asked):
    return [
        Climber(job, label, (cost,), (), {"speedup": 1 / cost, "num_params": 10, "memory_mib": 1.0})
        for job, (label, cost) in zip(jobs, asked.items(), strict=True)
    ]


def test_the_hopeless_end_early_and_a_run_again_does_nothing(local_ray, tmp_path, monkeypatch):
    jobs = gkd_jobs(tmp_path, CONFIG, (CHOICES, WORSE, WORST))
    start = [look.kl for look in (first_look(job) for job in jobs)]
    order = sorted(range(3), key=lambda i: start[i])  # the best first; it is the cheapest, so that it beats the others
    jobs = [jobs[i] for i in order]
    climbers = climbers_of(jobs, cheap=1.0, dear=2.0, dearest=3.0)
    sweep = jobs[0].artifact.store.artifact("sweep", {}, {})
    how = {"cpus": 4, "cluster": ClusterConfig(), "progress": Quiet()}  # all that there are: one child after the other
    rows, results = distil_children(climbers, 2, sweep, **how)

    cheap, *others = (rows[climber.name] for climber in climbers)
    assert [(row.rung, row.step, row.tokens) for row in cheap] == [(1, 6, 192), (2, 18, 576)]
    assert all(row.goes_on for row in cheap)
    assert [[row.goes_on for row in other] for other in others] == [[False], [False]], rows
    assert [job.artifact.finished for job in jobs] == [True, False, False]
    assert [steps_saved(job.artifact) for job in jobs[1:]] == [6, 6], "what was begun can go on some day"

    alone = gkd_jobs(tmp_path / "alone", CONFIG, (CHOICES, WORSE, WORST))[order[0]]
    threads = torch.get_num_threads()
    torch.set_num_threads(how["cpus"])
    distill_child(alone, Quiet())
    torch.set_num_threads(threads)
    assert published(jobs[0]) == published(alone)

    table = results.get_dataframe().set_index("budget")
    assert {"kl", "speedup", "num_params", "memory_mib", "tokens", "step", "rung", "child_folder"} <= set(table.columns)
    assert dict(table["kl"]) == {label: rows[c.name][-1].kl for label, c in zip(table.index, climbers, strict=True)}
    best = results.get_best_result()
    assert list(best.metrics_dataframe.dropna(subset="rung")["kl"]) == [row.kl for row in cheap]
    assert best.metrics["budget"] == "cheap" and best.metrics["kl"] == cheap[-1].kl
    assert best.metrics["child_folder"] == jobs[0].artifact.path(CHILD) and best.config == {"child": climbers[0].name}
    assert not list(tmp_path.rglob("*.pkl")) and not list(tmp_path.rglob("experiment_state*")), "Tune's own state is nowhere"

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and ".lease" not in str(path)}
    again, shown = distil_children(climbers, 2, sweep, **how)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and ".lease" not in str(path)}
    assert again == rows and after == before, "nothing is written, so nothing is done"
    assert shown.get_best_result().metrics["kl"] == best.metrics["kl"] and len(shown) == 3


def test_children_that_cannot_be_placed_are_not_waited_for(local_ray, tmp_path):
    config = CONFIG.model_copy(update={"use_gpu": True})
    climbers = climbers_of(gkd_jobs(tmp_path, config), cheap=1.0)
    sweep = climbers[0].job.artifact.store.artifact("sweep", {}, {})
    with pytest.raises(ClusterError, match="gkd.use_gpu: no node can hold a child's distillation with CPU: 1, GPU: 1"):
        distil_children(climbers, 2, sweep, cpus=1, cluster=ClusterConfig(), progress=Quiet())


def first_look(job):
    from puzzle_ray.distill.gkd import load_gkd_trainer

    trainer = load_gkd_trainer(job)
    trainer.guard.look(0)
    return trainer.guard.rows[0]


def published(job):
    state = load_model(job.artifact.local_folder(CHILD)).state_dict()
    return {name: value.tolist() for name, value in state.items()}, job.artifact.read(CURVE), job.artifact.read(LOOKS)
