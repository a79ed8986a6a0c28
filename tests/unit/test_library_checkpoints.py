"""Checkpoints of a block library: by time, from copies, without what never changes, and with which training ends in the same bits."""

import threading

import pytest
import torch
from layer_trainers import assert_same, changed, run, trainer

from puzzle_ray.distill.library_checkpoints import LibraryCheckpoints, checkpoint_file, start_file
from puzzle_ray.errors import StoreError
from puzzle_ray.store import Store

ENTRY = (1, "attention", "gqa:1")
BY_TIME = {"checkpoint_every": None, "checkpoint_minutes": 10}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def artifact(tmp_path):
    return Store(str(tmp_path)).artifact("library", {}, {})


@pytest.fixture
def clock():
    return Clock()


def test_by_time_and_to_the_same_bits(parent_folder, artifact, clock):
    """A save every ten minutes, with what training had then; a process that takes over from it ends as an undisturbed one."""
    config = changed(**BY_TIME)
    whole, first, second = (trainer(parent_folder, config) for _ in range(3))
    kept, cut = LibraryCheckpoints(artifact, config, clock), whole.schedule.positions // 2
    run(first, range(cut))
    clock.now = 599
    kept.after(cut - 1, [first])
    kept.settle()
    assert not artifact.exists(checkpoint_file(*ENTRY))
    clock.now = 600
    kept.after(cut - 1, [first])
    kept.settle()
    written = artifact.read_tensors(start_file(*ENTRY))[0]
    assert written.keys() == first.candidates[0].start_tensors().keys()
    assert not [name for name in artifact.read_tensors(checkpoint_file(*ENTRY))[0] if name.startswith("start/")]
    kept.restore(second)
    assert second.position == cut - 1
    assert_same(run(second), run(whole))
    kept.forget(*ENTRY)
    assert not artifact.exists(checkpoint_file(*ENTRY)) and not artifact.exists(start_file(*ENTRY))


def test_training_goes_on_while_copies_are_written(parent_folder, artifact, clock, monkeypatch):
    config = changed(**BY_TIME)
    first = trainer(parent_folder, config)
    kept, cut, may_write = LibraryCheckpoints(artifact, config, clock), first.schedule.positions - 4, threading.Event()
    run(first, range(cut))
    expected = {name: value.clone() for name, value in first.candidates[0].checkpoint()[0].items()}
    write = artifact.write_tensors

    def held(*arguments):
        assert may_write.wait(240)
        write(*arguments)

    monkeypatch.setattr(artifact, "write_tensors", held)
    clock.now = 600
    kept.after(cut - 1, [first])
    run(first, range(cut, cut + 2))
    clock.now = 1200
    kept.after(cut + 1, [first])  # one is being written: this one waits for its turn
    may_write.set()
    kept.settle()
    found = artifact.read_tensors(checkpoint_file(*ENTRY))[0]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())
    now = first.candidates[0].checkpoint()[0]
    assert any(not torch.equal(found[name], value) for name, value in now.items() if name in found)


def test_what_fails_in_the_background_is_raised(parent_folder, artifact, clock, monkeypatch):
    config = changed(**BY_TIME)
    first = trainer(parent_folder, config)
    kept = LibraryCheckpoints(artifact, config, clock)
    run(first, range(first.schedule.positions - 2))

    def full(*arguments):
        raise StoreError("store", "the disk is full", "free some space")

    monkeypatch.setattr(artifact, "write_tensors", full)
    clock.now = 600
    kept.after(0, [first])
    with pytest.raises(StoreError, match="the disk is full"):
        kept.settle()


def test_a_checkpoint_whose_start_is_lost_is_no_checkpoint(parent_folder, artifact):
    config = changed(checkpoint_every=1)
    first, second = trainer(parent_folder, config), trainer(parent_folder, config)
    kept = LibraryCheckpoints(artifact, config)
    run(first, range(first.schedule.positions - 2))
    kept.after(0, [first])
    assert artifact.exists(checkpoint_file(*ENTRY))
    artifact.remove(start_file(*ENTRY))
    kept.restore(second)
    assert second.position == trainer(parent_folder, config).position
