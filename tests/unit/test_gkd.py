"""Global distillation without Ray: the losses against their formulas, and training as a pure function of its inputs."""

import dataclasses
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from gkd_trainers import CONFIG, new_parent, new_trainer, random_child, random_tokens, summing_over_two

from puzzle_ray.data.splits import TOKENS
from puzzle_ray.distill.child_loss import layer_outputs
from puzzle_ray.distill.curriculum import gkd_steps
from puzzle_ray.distill.gkd import (
    CHECKPOINT,
    CHILD,
    CURVE,
    Diverged,
    GkdJob,
    GkdRow,
    GkdTrainer,
    distill_child,
    say_epochs,
    train_to_end,
)
from puzzle_ray.distill.guard import heldout_losses
from puzzle_ray.distill.losses import cosine_distance
from puzzle_ray.distill.published import as_published
from puzzle_ray.distill.schedule import LearningRate
from puzzle_ray.distill.settings import LmTokens
from puzzle_ray.distill.summary import gkd_summary
from puzzle_ray.errors import StoreError
from puzzle_ray.models.child import load_model, save_child
from puzzle_ray.progress import Quiet
from puzzle_ray.rows import rows_from_parquet
from puzzle_ray.store import Store


def snapshot(trainer):
    return {name: value.clone() for name, value in trainer.state_tensors().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_child_equal_to_its_parent_has_no_divergence():
    parent = new_parent()
    child = new_parent()
    trainer = GkdTrainer(child, parent, random_tokens(), CONFIG, seed=0)
    row = trainer.step()
    assert row.kl == pytest.approx(0, abs=1e-6) and row.cosine == pytest.approx(0, abs=1e-6)
    assert row.loss == pytest.approx(row.kl + row.cosine) and row.lm > 1


def test_hidden_states_are_the_layers_own_outputs():
    parent = new_parent().eval()
    ids = random_tokens().batch(0, 0, 2)
    with torch.no_grad(), layer_outputs(parent) as outputs:
        hidden = parent(ids, output_hidden_states=True).hidden_states
    assert len(outputs) == 3 and all(torch.equal(a, b) for a, b in zip(outputs[:2], hidden[1:3], strict=True))
    assert torch.equal(parent.model.norm(outputs[2]), hidden[3])  # transformers gives the last one after the final norm


def test_cosine_distance_ignores_length_and_counts_direction():
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert float(cosine_distance([x, x], [5 * x, 0.1 * x])) == pytest.approx(0, abs=1e-6)
    assert float(cosine_distance([x, x], [x, -x])) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError):
        cosine_distance([x], [x, x])


def test_gradients_reach_every_weight_of_the_child_and_none_of_the_parent():
    trainer = new_trainer()
    before = {name: value.clone() for name, value in trainer.parent.state_dict().items()}
    trainer.step()
    assert all(p.grad is None for p in trainer.parent.parameters())
    assert all(float(p.grad.abs().max()) > 0 for p in trainer.child.parameters())
    assert_same(before, trainer.parent.state_dict())


@pytest.mark.parametrize("name", ["kl", "cosine", "lm"])
def test_a_weight_of_zero_leaves_the_other_terms_alone(name):
    weights = {"kl_weight": 0.0, "cosine_weight": 0.0, "lm_weight": 0.0} | {f"{name}_weight": 2.0}
    row = new_trainer(CONFIG.model_copy(update=weights)).step()
    full = new_trainer().step()
    assert (row.kl, row.cosine, row.lm) == (full.kl, full.cosine, full.lm)
    assert row.loss == pytest.approx(2 * getattr(full, name))


def test_steps_and_learning_rate():
    assert gkd_steps(CONFIG) == 6 and gkd_steps(CONFIG.model_copy(update={"num_workers": 4})) == 2
    assert gkd_steps(CONFIG.model_copy(update={"tokens": 0})) == 0
    assert gkd_steps(CONFIG.model_copy(update={"tokens": 1})) == 1
    config = CONFIG.model_copy(update={"tokens": 100 * 64, "warmup_fraction": 0.2})
    rates = [LearningRate.of_gkd(config.learning_rate, 100, 0.2).at(step) for step in range(100)]
    assert max(rates) == rates[20] == config.learning_rate
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[0] > 0 and 0 < rates[-1] < 0.01 * config.learning_rate


def test_the_clipped_gradient_has_the_length_asked_for():
    trainer = new_trainer(CONFIG.model_copy(update={"gradient_clip": 0.01}))
    assert trainer.step().gradient_norm > 0.01
    assert float(torch.linalg.vector_norm(trainer.gradients.flat)) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_resuming_ends_in_the_same_bits(tmp_path, tied):
    whole = new_trainer(tied=tied)
    for _ in range(6):
        whole.step()

    step = Store(str(tmp_path)).artifact("gkd", {}, {})
    first = new_trainer(tied=tied)
    for _ in range(3):
        first.step()
    step.write_tensors(CHECKPOINT, first.state_tensors())
    second = new_trainer(tied=tied)
    train_to_end(second, step, Quiet())
    assert_same(snapshot(second), snapshot(whole))
    assert second.curve == whole.curve and [row.step for row in second.curve] == list(range(6))


@pytest.mark.parametrize("tied", [True, False])
def test_one_process_does_what_two_do(tmp_path, tied):
    config = CONFIG.model_copy(update={"num_workers": 2, "tokens": 3 * 128})
    alone = new_trainer(config, tied)
    tensors, barrier, step = {}, threading.Barrier(2), Store(str(tmp_path)).artifact("gkd", {}, {})
    two = [new_trainer(config, tied, ranks=[r], all_reduce=summing_over_two(r, tensors, barrier)) for r in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda trainer: train_to_end(trainer, step, Quiet(), writes=False), two))
    train_to_end(alone, step, Quiet())
    assert_same(snapshot(two[0]), snapshot(alone))
    assert_same(snapshot(two[1]), snapshot(alone))


def test_a_checkpoint_of_another_child_is_refused():
    trainer = new_trainer()
    state = snapshot(trainer)
    with pytest.raises(StoreError, match="exp_avg.model.norm.weight"):
        trainer.load_state_tensors({name: v for name, v in state.items() if name != "exp_avg.model.norm.weight"})
    with pytest.raises(StoreError, match="child.model.norm.weight"):
        trainer.load_state_tensors(state | {"child.model.norm.weight": torch.ones(3)})


def test_processes_that_see_different_checkpoints_are_refused(tmp_path):
    trainer = new_trainer(CONFIG.model_copy(update={"num_workers": 2}), ranks=[0], all_reduce=lambda done: done.add_(3))
    with pytest.raises(StoreError, match="not the same on every node"):
        train_to_end(trainer, Store(str(tmp_path)).artifact("gkd", {}, {}), Quiet())


def test_a_loss_that_is_not_finite_changes_no_weight():
    trainer = new_trainer()
    trainer.child.model.norm.weight.data.fill_(math.inf)
    before = snapshot(trainer)
    with pytest.raises(Diverged, match="step 0; lower gkd.learning_rate"):
        trainer.step()
    assert_same(snapshot(trainer), before)


def test_the_loss_falls():
    trainer = new_trainer(CONFIG.model_copy(update={"tokens": 60 * 64}))
    rows = [trainer.step() for _ in range(60)]
    for name in ("loss", "kl", "cosine"):
        first, last = (sum(getattr(row, name) for row in part) / 5 for part in (rows[:5], rows[-5:]))
        assert last < 0.7 * first


@pytest.fixture
def job(tmp_path):
    store = Store(str(tmp_path / "store"))
    parent = new_parent()
    parent.save_pretrained(tmp_path / "parent")
    (tmp_path / "parent" / "tokenizer.json").write_text("{}")
    child, data = store.artifact("realize", {}, {}), store.artifact("data", {}, {})
    with child.folder_to_publish(CHILD) as folder:
        save_child(random_child(parent).to(torch.bfloat16), tmp_path / "parent", folder)
    sequences = torch.from_numpy(random_tokens().sequences)
    data.write_tensors(TOKENS, {"train": sequences, "heldout": sequences[:2].clone()})
    return GkdJob(str(tmp_path / "parent"), child, data, store.artifact("gkd", {}, {}), CONFIG, seed=3)


def test_the_whole_stage(job):
    distill_child(job, Quiet())
    assert job.artifact.finished and not job.artifact.exists(CHECKPOINT)
    before, after = load_model(job.child.local_folder(CHILD)), load_model(job.artifact.local_folder(CHILD))
    assert after.dtype == torch.bfloat16 and after.config.puzzle_layers == before.config.puzzle_layers
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2
    assert (job.artifact.local_folder(CHILD) / "tokenizer.json").is_file()
    rows, _ = rows_from_parquet(job.artifact.read(CURVE), GkdRow)
    assert len(rows) == 6 and job.artifact.facts()["last_kl"] == rows[-1].kl and job.artifact.facts()["tokens"] == CONFIG.tokens


@pytest.mark.parametrize("rate", [1e-3, 1e30])
def test_facts_and_card_say_which_steps_the_published_weights_had(job, rate):
    """A training that ends early, or keeps earlier weights, is not said to have had all steps."""
    heldout = tuple(batch.numpy() for batch in random_tokens().first(96, 2))
    config = CONFIG.model_copy(update={"learning_rate": rate, "warmup_fraction": 0.0})
    job = dataclasses.replace(job, config=config, heldout=heldout)
    distill_child(job, Quiet())
    facts, folder = job.artifact.facts(), job.artifact.local_folder(CHILD)
    (made,) = json.loads((folder / "puzzle_ray.json").read_text())["made"]
    assert facts["kept"] == f"step {made['steps']}" and facts["steps"] == 6
    if rate < 1:
        assert "ended_after" not in facts
    else:
        assert made["steps"] == facts["ended_after"] == 1 and "it ended after step 1 of 6" in gkd_summary(facts)


@pytest.mark.parametrize("average", [False, True])
def test_what_is_watched_is_the_child_as_it_is_published(job, average):
    """This child is bfloat16: most of what steps of 1e-5 do to its weights is rounded away when it is written."""
    heldout = tuple(batch.numpy() for batch in random_tokens().first(96, 2))
    config = CONFIG.model_copy(update={"learning_rate": 1e-5, "average_weights": average, "heldout_looks": 6})
    job = dataclasses.replace(job, config=config, heldout=heldout)
    distill_child(job, Quiet())
    facts, child = job.artifact.facts(), load_model(job.artifact.local_folder(CHILD), torch.float32)
    parent = load_model(Path(job.parent), torch.float32)
    kls = torch.cat([heldout_losses(child, parent, torch.from_numpy(ids))[0] for ids in heldout])
    assert facts["heldout_kl"] == pytest.approx(float(kls.mean()), rel=1e-6) and facts["kept"] != "start"


def test_steps_that_bfloat16_does_not_hold_are_no_gain(job):
    heldout = tuple(batch.numpy() for batch in random_tokens().first(96, 2))
    job = dataclasses.replace(job, config=CONFIG.model_copy(update={"learning_rate": 1e-12}), heldout=heldout)
    distill_child(job, Quiet())
    line = gkd_summary(job.artifact.facts())
    assert job.artifact.facts()["kept"] == "start" and "it is published as it was" in line and "raise gkd.learning_rate" in line


def test_weights_are_rounded_for_a_while_and_keep_their_bits():
    trainer = new_trainer()
    trainer.step()
    before = snapshot(trainer)
    with as_published(trainer.parameters, torch.bfloat16):
        assert all(torch.equal(p, before[f"child.{name}"].bfloat16()) for name, p in trainer.parameters.items())
    assert_same(snapshot(trainer), before)


def test_it_is_said_where_no_token_is_chosen_for_the_next_token_loss(job):
    """That loss was never taken; and nothing else is said of a training that is not watched."""
    for least, said in ((0.9999, "gkd.lm_tokens chose no token of the text"), (1e-9, "")):
        config = CONFIG.model_copy(update={"lm_weight": 1.0, "lm_tokens": LmTokens(min_parent_probability=least)})
        own = dataclasses.replace(job, config=config, artifact=job.artifact.store.artifact("gkd", {"least": least}, {}))
        distill_child(own, Quiet())
        assert gkd_summary(own.artifact.facts())[:40] == said


def test_it_is_said_how_often_the_text_is_read(job, capsys):
    """40 sequences of 16 tokens, of which the first job reads 384 tokens."""
    say_epochs(job)
    assert capsys.readouterr().err == ""
    distill_child(dataclasses.replace(job, config=CONFIG.model_copy(update={"tokens": 1600, "micro_batch_tokens": 320})), Quiet())
    assert capsys.readouterr().err == "  gkd: its text is read 2.5 times over: there are 640 tokens to train on\n"


def test_without_tokens_the_child_stays_as_it_is(job):
    job = dataclasses.replace(job, config=CONFIG.model_copy(update={"tokens": 0}))
    distill_child(job, Quiet())
    before, after = load_model(job.child.local_folder(CHILD)), load_model(job.artifact.local_folder(CHILD))
    assert_same(before.state_dict(), after.state_dict())
