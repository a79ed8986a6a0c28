"""Layers in processes give the bits of shards that one process reads one after the other, and a process that dies changes none."""

import json
import os
import shutil
import signal
from contextlib import closing
from pathlib import Path

import pytest
import ray
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from small_models import save_parent
from small_runs import SMALL, save_parent_with_text

from actors.lone_worker import evaluate_in_shards, predict_in_shards, run_beside_shards
from actors.model_shards import LayersInActors, placed
from actors.readers import AskOnRay
from jobs.evaluate_child import show
from jobs.run import Run
from puzzle_ray.artifacts import LayerChoice, Scenario
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.compression import Setting
from puzzle_ray.config import validated
from puzzle_ray.errors import ClusterError, ParentError
from puzzle_ray.evaluation import evaluate as library
from puzzle_ray.evaluation.comparison import Comparison
from puzzle_ray.evaluation.reader import AskHere
from puzzle_ray.evaluation.requests import Continuations, Likelihoods, Predictions
from puzzle_ray.evaluation.settings import EvaluateConfig
from puzzle_ray.models.blocks import CPU
from puzzle_ray.models.child import new_child, read_config, save_child
from puzzle_ray.models.shards import in_this_process
from puzzle_ray.pipeline import run as run_serially
from puzzle_ray.process import compute_with
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.downstream import Question, question_batches
from puzzle_ray.store import Store

IDS = torch.randint(2, VOCAB_SIZE, (6, 24), generator=torch.Generator().manual_seed(0))
BATCHES = list(IDS.split(2))
CLUSTER = ClusterConfig(step_timeout_s=240.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    parent = save_parent(root / "parent", vocab_size=VOCAB_SIZE, num_hidden_layers=4)
    byte_tokenizer().save_pretrained(parent)
    torch.manual_seed(1)
    choices = [LayerChoice("gqa:1", "ffn:24"), LayerChoice("noop"), LayerChoice("linear", "noop"), LayerChoice()]
    save_child(new_child(read_config(parent), choices, torch.bfloat16), parent, root / "child")
    return {"parent": str(parent), "child": str(root / "child")}


def test_on_ray_an_evaluation_is_that_of_one_process(local_ray, folders):
    compute_with(1)
    questions = question_batches([Question("a b", ("c", "d e"), 0), Question("f", ("g", "h"), 1)], byte_tokenizer(), 32)
    config, scenario = EvaluateConfig(tokens=144, prompt="ab", sample_tokens=3), Scenario(2, 4, 2)
    comparison = Comparison(config, scenario, questions=questions, separator=0)
    expected = library.evaluate_in_shards(folders, BATCHES, comparison, Quiet(), in_this_process(3), 3)
    placement = placed(folders.values(), CLUSTER, 3, "evaluate")
    assert len(placement.layers) == 3
    how = (folders, [ids.numpy() for ids in BATCHES], comparison)
    assert run_beside_shards(evaluate_in_shards, *how, placement=placement, what="evaluate") == expected


@pytest.mark.parametrize("who", ["shard", "asks"])
def test_who_dies_is_started_again_and_no_figure_changes(local_ray, folders, tmp_path, who):
    compute_with(1)
    expected = library.predictions(library.ShardedModels(folders, in_this_process(2), CPU), BATCHES)
    marker = tmp_path / "killed"

    def dies_once(num_threads, shards, num_gpus, *args):
        """As `predict_in_shards`, but a shard, or who asks, is killed when the parent's first batch has come back."""
        arrived = LayersInActors._arrived

        def killed_first(self, ref):
            found = arrived(self, ref)
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid() if who == "asks" else ray.get(shards.actors[1].pid.remote(), timeout=240), signal.SIGKILL)
            return found

        LayersInActors._arrived = killed_first
        return predict_in_shards(num_threads, shards, num_gpus, *args)

    how = (folders, [ids.numpy() for ids in BATCHES], None)
    placement = placed(folders.values(), CLUSTER, 2, "evaluate")
    assert run_beside_shards(dies_once, *how, placement=placement, what="evaluate") == expected
    assert marker.exists()


def test_readers_ask_shards_and_answer_the_same(local_ray, folders, tmp_path):
    compute_with(1)
    chunks = [
        Likelihoods((((1, 2, 3), (4, 5)), ((7,), (8, 9)))),
        Predictions(IDS[:3].numpy(), 0),
        Continuations(((5, 6), (8,)), 3),
    ]
    asked = [(name, chunk) for name in folders for chunk in chunks]
    here, there = (Store(str(tmp_path)).artifact("quality", {"where": where}, {}) for where in ("here", "there"))
    expected = AskHere(folders, 64, here, Quiet(), layers_of=in_this_process(2))(asked)
    with closing(AskOnRay(folders, 64, CLUSTER, there, Quiet(), num_shards=2)) as ask:
        found = ask(asked)
        assert len(ask.pool.workers[0].actors) == 3
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def test_what_a_shard_raises_and_its_silence_are_told(local_ray, folders, tmp_path):
    placement = placed(folders.values(), ClusterConfig(step_timeout_s=1e-6), 2, "evaluate")
    how = (folders, [ids.numpy() for ids in BATCHES], None)
    with pytest.raises(ClusterError, match="evaluate: a shard of .* has not .* within 1e-06 s; raise cluster.step_timeout_s"):
        run_beside_shards(predict_in_shards, *how, placement=placement, what="evaluate")
    broken = save_parent(tmp_path / "broken", vocab_size=VOCAB_SIZE, num_hidden_layers=4, num_attention_heads=2)
    config = (Path(folders["parent"]) / "config.json").read_text()
    (broken / "model.safetensors").write_bytes((Path(folders["parent"]) / "model.safetensors").read_bytes()[:-100])
    (broken / "config.json").write_text(config)
    placement = placed([folders["parent"]], CLUSTER, 2, "evaluate")
    with pytest.raises(ParentError, match="cannot be read"):
        run_beside_shards(predict_in_shards, {"parent": str(broken)}, *how[1:], placement=placement, what="evaluate")


def test_gpus_that_are_missing_are_told_before_work(local_ray, folders):
    with pytest.raises(ClusterError, match="no node can hold a shard with GPU: 0.5"):
        placed(folders.values(), ClusterConfig(gpus_per_shard=0.5), 2, "evaluate")


def test_a_run_in_shards_ends_with_the_same_bytes_as_in_one_process_and_says_no_speed(local_ray, tmp_path, monkeypatch, capsys):
    """What is not the matter here is copied: it is found under the same keys."""
    monkeypatch.setattr("puzzle_ray.pipeline.num_cores", lambda: 4)
    folder, text = save_parent_with_text(tmp_path / "parent")
    values = SMALL | {
        "parent": str(folder),
        "data": {"train": str(text), "sequence_length": 16, "document_mask": True},
        "profile": SMALL["profile"] | {"engine": "roofline", "device": "H100"},
        "evaluate": SMALL["evaluate"] | {"num_shards": 2},
    }

    def config_of(store):
        return validated(json.loads(json.dumps(values | {"store": str(store)})))

    serial, on_ray = tmp_path / "serial", tmp_path / "on_ray"
    found = run_serially(Setting(config_of(serial), Store(str(serial)), Quiet()))
    assert found.evaluation["measured_speedup"] is None and found.evaluation["models"]["child"]["kl"] > 0
    shutil.copytree(serial, on_ray)
    for stage in ("evaluation", "quality"):
        shutil.rmtree(next(on_ray.glob(f"{stage}-*")))
    run = Run(config_of(on_ray), Quiet())
    run.done("quality", "evaluation", "report")
    for name in ("evaluation", "quality"):
        (file,) = serial.glob(f"{name}-*/{name}.json")
        assert (on_ray / file.relative_to(serial)).read_bytes() == file.read_bytes(), name
    why = "not measured: the model is spread over 2 shards"
    assert why in next(on_ray.glob("report-*/index.html")).read_text() and f"speed is {why}" in capsys.readouterr().err
    show(run)
    shown = capsys.readouterr().out
    assert f"speed is {why}" in shown and "nan" not in shown
