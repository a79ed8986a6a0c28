"""Global distillation with sharded models (FSDP2 over gloo): it does what one process does, and its checkpoints fit any number of them."""

import json
from types import SimpleNamespace

import pytest
import torch
from gkd_processes import CONFIGS, STEPS, distil, group, save_models, sharded_trainer, steps
from gkd_trainers import CHOICES, new_trainer, watched
from safetensors import safe_open
from small_models import save_parent
from torch import distributed, multiprocessing

from puzzle_ray.distill import parallel
from puzzle_ray.distill.parallel import ddp_bytes, is_sharded
from puzzle_ray.distill.settings import GkdConfig
from puzzle_ray.distill.sharded_checkpoint import RUN, SHARDS, FolderCheckpoints
from puzzle_ray.distill.sharding import Shards
from puzzle_ray.errors import StoreError
from puzzle_ray.families.registry import families
from puzzle_ray.models.checkpoint import Checkpoint
from puzzle_ray.models.child import load_model, model_without_weights, new_child, read_config, save_child
from puzzle_ray.models.child_files import write_model
from puzzle_ray.models.head import final_states

WEIGHTS = "model.safetensors"
PRELOADED = ["torch.distributed.fsdp", "transformers.models.llama.modeling_llama"]  # once for both processes


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    """Two processes that distil two children, with tied and untied heads, one after the other."""
    folder = tmp_path_factory.mktemp("two")
    for kind in STEPS:
        save_models(folder / kind, kind == "tied")
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    multiprocessing.start_processes(distil, (2, str(folder)), nprocs=2, start_method="forkserver")
    return folder


@pytest.fixture(scope="module", params=list(STEPS))
def two(request, run_of_two):
    """(folder of the models, kind of head, what the two processes found)."""
    folder = run_of_two / request.param
    return folder, request.param, torch.load(folder / "found.pt", weights_only=False)


@pytest.fixture(scope="module")
def alone(two):
    """What one process without shards does for the same two workers: the work of DDP."""
    trainer = watched(CONFIGS[two[1]], tied=two[1] == "tied")
    steps(trainer, trainer.total_steps)
    return trainer


@pytest.fixture
def one(tmp_path):
    """This process is a group of its own."""
    with group(tmp_path, 0, 1):
        yield


def test_two_sharded_workers_do_what_two_whole_ones_do(two, alone):
    curve, looks, weights = two[2][0]
    assert len(curve) == alone.total_steps
    assert max(abs(a.loss - b.loss) for a, b in zip(curve, alone.curve, strict=True)) < 1e-4
    assert max(abs(a.gradient_norm - b.gradient_norm) for a, b in zip(curve, alone.curve, strict=True)) < 1e-3
    assert max(abs(a.kl - b.kl) for a, b in zip(looks, alone.guard.rows, strict=True)) < 1e-4
    assert weights.keys() == alone.parameters.keys()
    assert all(torch.allclose(weights[name], p.detach(), atol=2e-3) for name, p in alone.parameters.items())


def test_a_resumed_run_ends_in_the_same_bits(two):
    (curve, looks, weights), (again, looks_again, weights_again), (_, taken_up), _ = two[2]
    assert taken_up == len(curve) // 2 and curve == again and looks == looks_again
    assert all(torch.equal(value, weights_again[name]) for name, value in weights.items())


def test_layers_that_are_run_again_change_no_bit_and_half_precision_little(two):
    (curve, *_), _, (recomputed, _), half = two[2]
    assert recomputed == curve[0]
    assert half != curve[0] and half.loss == pytest.approx(curve[0].loss, rel=0.02)


def test_one_worker_goes_on_where_two_were(two, one):
    folder, _, ((curve, looks, _), *_) = two
    half = len(curve) // 2
    trainer = sharded_trainer(folder)
    FolderCheckpoints(folder / "checkpoint").load(trainer)
    assert trainer.next_step == half and trainer.ranks == range(2) and trainer.curve == curve[:half]
    steps(trainer, trainer.total_steps)
    assert max(abs(a.loss - b.loss) for a, b in zip(curve, trainer.curve, strict=True)) < 1e-4
    assert trainer.guard.rows[0] == looks[0] and abs(trainer.guard.rows[-1].kl - looks[-1].kl) < 1e-4


def test_a_range_test_on_shards_finds_the_rate_that_one_on_the_whole_child_finds(two, one):
    folder, kind, _ = two
    changes = {"learning_rate": "auto", "tokens": 20 * 128}
    trainers = [sharded_trainer(folder, **changes), watched(CONFIGS[kind].model_copy(update=changes), tied=kind == "tied")]
    start = trainers[0].shards.whole_tensors(dict(trainers[0].parameters))
    start = {name: value.clone() for name, value in start}
    for trainer in trainers:
        trainer.guard.look(0)
        trainer.choose_rate(SimpleNamespace(advance=lambda *count, **facts: None))
    sharded, whole = ([(trial.rate, trial.kl) for trial in trainer.trials] for trainer in trainers)
    assert [rate for rate, _ in sharded] == [rate for rate, _ in whole] and len(whole) >= 2
    assert max(abs(a - b) for (_, a), (_, b) in zip(sharded, whole, strict=True)) < 1e-3
    assert trainers[0].learning_rate.peak == trainers[1].learning_rate.peak
    after = dict(trainers[0].shards.whole_tensors(dict(trainers[0].parameters)))
    assert all(torch.equal(value, after[name]) for name, value in start.items()), "the child is as it was"


def test_shards_are_watched_as_the_child_is_published(one, tmp_path):
    """A child in bfloat16. Its shards have their own bits again afterwards, which bfloat16 does not hold."""
    save_models(tmp_path / "tied", True)
    trainer, whole = sharded_trainer(tmp_path / "tied"), watched(CONFIGS["tied"], published=torch.bfloat16)
    trainer.published = torch.bfloat16
    for each in (trainer, whole):
        steps(each, 2)
    before = {name: value.clone() for name, value in trainer.shards.whole_tensors(trainer.parameters)}
    (kl, loss), (whole_kl, whole_loss) = trainer.guard.measure(), whole.guard.measure()
    assert abs(kl - whole_kl) < 1e-5 and abs(loss - whole_loss) < 1e-5
    after = dict(trainer.shards.whole_tensors(trainer.parameters))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(torch.equal(value, value.bfloat16().float()) for value in before.values() if value.ndim == 2)
    trainer.published = torch.float32
    assert trainer.guard.measure()[0] != kl


def test_every_process_writes_its_own_shard_and_nothing_is_pickled(two):
    folder, kind, _ = two
    names = sorted(path.relative_to(folder / "checkpoint") for path in (folder / "checkpoint").rglob("*") if path.is_file())
    shards = [name for name in names if name.parts[0] == SHARDS]
    assert [str(name) for name in names if name not in shards] == [RUN] and all(name.suffix == ".safetensors" for name in names)
    written = {}
    for name in shards:
        with safe_open(folder / "checkpoint" / name, "pt") as file:
            numbers = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
        process = name.name.partition("-model")[0]
        written[process] = written.get(process, 0) + numbers
    assert len(written) == 2 < len(shards)
    copies = 4 + CONFIGS[kind].average_weights  # weights, two moments, best weights; their average
    total = copies * sum(p.numel() for p in new_trainer(tied=kind == "tied").parameters.values())
    assert sum(written.values()) == total and max(written.values()) < 0.6 * total


def test_a_checkpoint_without_one_workers_shard_is_refused(two, one, tmp_path):
    folder, _, _ = two
    source, target = folder / "checkpoint", tmp_path / "checkpoint"
    (target / SHARDS).mkdir(parents=True)
    for path in (source / RUN, *(source / SHARDS).glob("shard-00001-*")):
        (target / path.relative_to(source)).write_bytes(path.read_bytes())
    with pytest.raises(StoreError, match="remove the checkpoint"):
        FolderCheckpoints(target).load(sharded_trainer(folder))


@pytest.mark.parametrize("family", sorted(families()))
def test_a_sharded_child_is_the_loaded_one_and_is_written_as_it_was(family, one, tmp_path):
    """Weights, buffers and outputs; and weights that are gathered one by one give the files that transformers writes."""
    parent, folder = save_parent(tmp_path / "parent", family), tmp_path / "child"
    torch.manual_seed(1)
    save_child(new_child(read_config(parent), CHOICES, torch.float32), parent, folder)
    plain, shards = load_model(folder), Shards(torch.device("cpu"))
    sharded = shards.load(folder, torch.float32)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(shards.states(sharded, ids), final_states(plain, ids))
    shards.release(sharded)
    buffers = dict(sharded.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in plain.named_buffers())
    gathered, again = shards.whole_tensors(dict(sharded.named_parameters())), tmp_path / "again"
    again.mkdir()
    write_model(model_without_weights(folder), gathered, torch.float32, folder, again)
    assert (again / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    mine, expected = (json.loads((where / "config.json").read_text()) for where in (again, folder))
    assert mine == expected


def test_a_group_of_more_processes_than_micro_batches_takes_as_many_passes_each(two, one):
    """Where ranks do not come out even, a pass that does not count is taken: it changes nothing."""
    folder, _, _ = two
    plain, padded = sharded_trainer(folder), sharded_trainer(folder)
    passes = list(padded._passes())
    padded._passes = lambda: [*passes, (0, 0, False)]
    assert padded.step() == plain.step()
    assert distributed.get_world_size() == 1


def test_what_a_worker_would_hold_decides_and_the_key_tells_what_was_asked_for(two):
    folder, kind, _ = two
    held = ddp_bytes(Checkpoint(folder / "child"), Checkpoint(folder / "parent"), watched=True)
    plain = new_trainer(tied=kind == "tied")
    child, parent = (sum(p.numel() for p in model.parameters()) for model in (plain.child, plain.parent))
    assert held == 20 * child + 4 * parent
    gpus = GkdConfig(use_gpu=True, num_workers=2)
    assert is_sharded(gpus, held, int(1.9 * held), 2) and not is_sharded(gpus, held, 2 * held, 2)
    assert not is_sharded(gpus, held, held, 1) and not is_sharded(GkdConfig(num_workers=2), held, held, 2)
    keys = [
        GkdConfig(**s).identity() for s in ({}, {"parallel": "ddp"}, {"activation_checkpointing": True}, {"parallel": "fsdp"})
    ]
    assert keys[0] == keys[1] == keys[2] != keys[3]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"cpu_offload": True}, "set gkd.use_gpu=true and gkd.parallel=fsdp"),
        ({"cpu_offload": True, "parallel": "fsdp"}, "set gkd.use_gpu=true"),
        ({"num_workers": 2, "min_workers": 3}, "min_workers=3 is more than num_workers=2"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        GkdConfig(**settings)


def test_a_group_that_is_smaller_for_a_while_shards_as_the_whole_one(monkeypatch):
    """Else it would not find the other kind's checkpoints when it is whole again."""
    config = GkdConfig(use_gpu=True, num_workers=8, min_workers=1)
    child = SimpleNamespace(local_folder=lambda name: name)
    job = SimpleNamespace(config=config, parent="p", revision=None, child=child, heldout=())
    monkeypatch.setattr(parallel, "locate", lambda *_: None)
    monkeypatch.setattr(parallel, "Checkpoint", lambda _: None)
    monkeypatch.setattr(parallel, "ddp_bytes", lambda *_: 100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=100))
    assert parallel.looks_sharded(job, "cpu", lambda votes: None)
