"""A child written file by file is the one that transformers would write, and no whole model is in memory meanwhile."""

import json
import subprocess
import sys

import pytest
import torch
from small_models import save_parent
from torch import nn

from puzzle_ray.artifacts import KINDS, PARENT, LayerChoice
from puzzle_ray.errors import ParentError
from puzzle_ray.families.registry import families
from puzzle_ray.models import child_files
from puzzle_ray.models.blocks import logits_layer_by_layer, subblock_state
from puzzle_ray.models.child import assemble, load_model, new_child, quiet_transformers, read_config, save_child
from puzzle_ray.models.child_files import write_child
from puzzle_ray.models.describe import describe

IDS = torch.arange(32).remainder(96).unsqueeze(0)
CHOICES = (LayerChoice(ffn="noop"), LayerChoice("linear", "ffn:24"), LayerChoice("noop"))


def states(config, descriptor):
    """A function in a library's place: random weights for the replaced subblocks."""

    def states_of(index, choice):
        torch.manual_seed(index)
        layer = new_child(config, [choice] * 3, torch.float32).get_submodule(descriptor.layers)[index]
        return {k: subblock_state(layer, k, descriptor) for k in KINDS if choice.variant(k) != PARENT}

    return states_of


@pytest.mark.parametrize("family", sorted(families()))
def test_files_are_those_of_transformers(family, tmp_path, monkeypatch):
    folder = save_parent(tmp_path / "parent", family)
    config = read_config(folder)
    descriptor = describe(config)
    states_of, dtype = states(config, descriptor), torch.bfloat16
    trained = {(i, kind): state for i, c in enumerate(CHOICES) for kind, state in states_of(i, c).items()}
    child = assemble(folder, config, CHOICES, trained, dtype)
    save_child(child, folder, tmp_path / "whole")
    (tmp_path / "written").mkdir()
    assert write_child(folder, config, CHOICES, states_of, dtype, tmp_path / "written") == child.num_parameters()
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "written").iterdir()} == names
    for name in names:
        assert (tmp_path / "written" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

    monkeypatch.setattr(child_files, "MAX_FILE_BYTES", 20_000)
    (tmp_path / "parts").mkdir()
    write_child(folder, config, CHOICES, states_of, dtype, tmp_path / "parts")
    files = list((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 1 and all(file.stat().st_size < 20_000 + 10_000 for file in files)
    again = load_model(tmp_path / "parts")
    with torch.inference_mode():
        logits = child(IDS).logits
        assert torch.equal(again(IDS).logits, logits)
    saved = read_config(tmp_path / "parts")
    assert torch.equal(logits_layer_by_layer(tmp_path / "parts", describe(saved), saved, dtype, IDS), logits)


def test_what_is_missing_or_of_another_shape_is_said(parent_folder, tmp_path):
    config = read_config(parent_folder)
    states_of = states(config, describe(config))

    def without(index, choice):
        return {kind: dict(list(state.items())[1:]) for kind, state in states_of(index, choice).items()}

    def wider(index, choice):
        return {k: {name: torch.cat([v, v]) for name, v in state.items()} for k, state in states_of(index, choice).items()}

    with pytest.raises(ParentError, match="no weights for"):
        write_child(parent_folder, config, CHOICES, without, torch.float32, tmp_path)
    with pytest.raises(ParentError, match="the child has"):
        write_child(parent_folder, config, CHOICES, wider, torch.float32, tmp_path)


MEASURED = """
import json, resource, sys
from pathlib import Path
import torch
from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.distill import realize
from puzzle_ray.models.child import read_config
from puzzle_ray.models.child_files import write_child

parent, small, target = (Path(word) for word in sys.argv[1:])
peaks = []
for folder in (small, parent):
    config = read_config(folder)
    choices = [LayerChoice(ffn="noop")] + [LayerChoice()] * (config.num_hidden_layers - 1)
    realize._exchanged(folder, config, choices, lambda *_: {}, torch.float32)
    (target / folder.name).mkdir(parents=True)
    write_child(folder, config, choices, lambda *_: {}, torch.float32, target / folder.name)
    realize._saved(target / folder.name, torch.float32)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted in other units elsewhere")
def test_memory_is_that_of_a_layer_and_not_of_the_model(tmp_path):
    """In a process of its own: a model of 105 MB in bfloat16, 210 MB in float32, after a tiny one has loaded all libraries."""
    small = save_parent(tmp_path / "small")
    shape = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 32, "num_key_value_heads": 4, "head_dim": 64}
    large = save_parent(tmp_path / "large", **shape)
    size = (large / "model.safetensors").stat().st_size
    assert isinstance(load_model(large), nn.Module) and size > 190 << 20
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(large), str(small), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = json.loads(done.stdout.splitlines()[-1])
    assert (after - before) * 1024 < size / 4, f"{before} KiB, then {after} KiB"


def test_progress_bars_are_as_before_and_nothing_is_said_of_them(monkeypatch, recwarn):
    """Every command sets HF_HUB_DISABLE_PROGRESS_BARS: `export-child` and `compress` showed the hub's warning about it."""
    from transformers.utils import logging

    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(logging, "_tqdm_active", True)  # off where the variable is set for the tests themselves
    with quiet_transformers():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled() and not recwarn
    monkeypatch.setattr(logging, "_tqdm_active", False)  # as logging.disable_progress_bar() of a user leaves it
    with quiet_transformers():
        pass
    assert not logging.is_progress_bar_enabled()
