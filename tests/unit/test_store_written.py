"""What has no record yet is compared with what was written, too."""

import random

import pytest
import torch

from puzzle_ray.errors import Damaged, StoreError
from puzzle_ray.store import Store, adding_items, do_once, files
from puzzle_ray.store.upkeep import verify


@pytest.fixture(params=["folder", "memory"])
def store(request, tmp_path):
    return Store(str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}")


def again(step):
    """A new process's view: nothing is remembered."""
    files._KNOWN.clear()
    return step.store.artifact(step.stage, step.settings, step.inputs)


def overwrite(step, name, change):
    data = step.store.filesystem.cat_file(step.path(name))
    step.store.filesystem.pipe_file(step.path(name), change(data))


def flip(data):
    position = random.Random(len(data)).randrange(len(data))
    return data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]


def killed(work):
    """The work of a process that is killed behind it."""

    def then_die(step):
        work(step)
        raise KeyboardInterrupt

    return then_die


def test_a_changed_digit_in_what_is_never_finished_is_seen_and_made_again(store):
    step, said = store.artifact("measured", {}, {}), []
    with adding_items(step):
        for name in ("a", "b"):
            step.write_json(f"children/{name}.json", {"kl": 0.5012})
    overwrite(step, "children/a.json", lambda data: data.replace(b"0.5012", b"0.1012"))
    with pytest.raises(Damaged, match=r"^measured: .*children/a.json is damaged"):
        again(step).read_json("children/a.json")
    found = verify(store)
    assert [problem.file for problem in found[step.name]] == ["children/a.json"]
    resumed = again(step)
    with adding_items(resumed, said.append):
        assert resumed.names("children") == ["b.json"] and resumed.read_json("children/b.json") == {"kl": 0.5012}
        resumed.write_json("children/a.json", {"kl": 0.7})
    assert said == ["[measured] children/a.json was damaged and is made again"] and again(step).verify() == []


@pytest.mark.parametrize("name", ["layer_000.safetensors", "checkpoints/layer_000.safetensors"])
def test_a_bit_that_flips_between_kill_and_resume_is_not_signed_over(store, name):
    step, said = store.artifact("library", {}, {}), []
    with pytest.raises(KeyboardInterrupt):
        do_once(step, killed(lambda step: step.write_tensors(name, {"w": torch.ones(4)})))
    overwrite(step, name, lambda data: data[:-1] + bytes([data[-1] ^ 0x40]))
    made = []

    def work(step):
        if not step.exists(name):
            made.append(name)
            step.write_tensors(name, {"w": torch.ones(4)})
        step.finish({})

    assert do_once(again(step), work, said.append) and made == [name] and len(said) == 1
    assert torch.equal(again(step).read_tensors(name)[0]["w"], torch.ones(4)) and again(step).verify() == []
    assert [hidden for hidden in store.names(step.url) if hidden.startswith(".")] == []


def test_damage_behind_the_look_at_the_beginning_is_not_signed_over(store):
    """The record holds what was written, not what lies there at the end."""
    step = store.artifact("library", {}, {})
    step.write("a.bin", bytes(100))
    overwrite(step, "a.bin", flip)
    late = again(step)
    late.finish({})
    with pytest.raises(Damaged, match="a.bin is damaged"):
        again(step).read("a.bin")
    step = store.artifact("library", {"n": 2}, {})
    step.write("a.bin", bytes(100))
    overwrite(step, "a.bin", lambda data: data[:-1])
    with pytest.raises(Damaged, match="a.bin is damaged"):
        again(step).finish({})


@pytest.mark.parametrize("arrived", [True, False])
def test_who_is_killed_while_it_writes_leaves_a_whole_item(store, arrived, monkeypatch):
    """Killed behind the note and before the item, or behind both; the item is what it was or what it should be, and both are good."""
    step = store.artifact("gkd", {}, {})
    step.write("checkpoint.json", b'{"step": 1}')
    if arrived:
        step.write("checkpoint.json", b'{"step": 22}')
    else:
        step._written.about_to("checkpoint.json", files.FileEntry(12, "0" * 64))
    seen = again(step)
    expected = b'{"step": 22}' if arrived else b'{"step": 1}'
    assert seen.verify() == [] and seen.discard_damage() == [] and seen.read("checkpoint.json") == expected
    assert again(step).read("checkpoint.json") == expected
    after = again(step)  # another process writes over it
    after.write("checkpoint.json", b'{"step": 333}')
    assert again(step).read("checkpoint.json") == b'{"step": 333}' and again(step).verify() == []
    last = again(step)
    last.finish({})
    assert again(step).verify() == [] and again(step).read("checkpoint.json") == b'{"step": 333}'


def test_contents_of_one_size_are_told_apart(store):
    step = store.artifact("gkd", {}, {})
    for text in (b"[1]", b"[2]"):
        again(step).write("a.json", text)
    again(step).finish({})
    assert again(step).verify() == [] and again(step).read("a.json") == b"[2]"


def test_what_stays_of_a_damaged_finished_artifact_is_still_compared(store):
    step = store.artifact("library", {}, {})
    for name in ("a.bin", "b.bin"):
        step.write(name, bytes(100))
    step.finish({})
    store.filesystem.rm(step.path("a.bin"))
    assert again(step).discard_damage() == ["a.bin"]
    overwrite(step, "b.bin", flip)
    assert again(step).discard_damage() == ["b.bin"] and again(step).names() == []


def test_a_damaged_note_is_damage(store):
    step = store.artifact("measured", {}, {})
    step.write("a.json", b"[1]")
    overwrite(step, ".written/a.json", lambda data: data[:-3])
    with pytest.raises(StoreError, match="a.json is damaged"):
        again(step).read("a.json")
    assert again(step).discard_damage() == ["a.json"] and store.sizes(step.url) == {}


def test_what_is_removed_leaves_no_note(store):
    step = store.artifact("measured", {}, {})
    for name in ("kept.json", "scratch/a.json", "scratch/b.json"):
        step.write(name, b"[1]")
    step.remove("scratch")
    assert sorted(store.sizes(step.url)) == [".written/kept.json", "kept.json"]
