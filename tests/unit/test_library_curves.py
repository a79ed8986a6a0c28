"""Loss curves of a library: exact, and in no header, so that a long training does not meet the 100 MB that a header may have."""

from __future__ import annotations

import io
import json
from array import array

import pyarrow.parquet as pq
import pytest
import torch
from layer_trainers import SPACE, assert_same, changed, restored, run, trainer

from puzzle_ray.data.order import Tokens
from puzzle_ray.distill.library import (
    CURVE,
    CURVES_TABLE,
    GroupTrainer,
    Library,
    build_serially,
    finish_library,
    variant_file,
)
from puzzle_ray.distill.library_checkpoints import checkpoint_file
from puzzle_ray.models.child import read_config
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space


def header_size(artifact, name: str) -> int:
    """Bytes of a safetensors header."""
    return int.from_bytes(artifact.read(name)[:8], "little")


def header_sizes(artifact) -> dict[str, int]:
    return {name: header_size(artifact, name) for name in artifact.names() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def libraries(parent_folder, tmp_path_factory):
    """The same space trained on 8 micro-batches and on 200."""
    space, found = search_space(read_config(parent_folder), *SPACE, 8), {}
    tokens = Tokens(torch.randint(0, 96, (64, 16)).int().numpy())
    for steps in (8, 200):
        step = Store(str(tmp_path_factory.mktemp("curves"))).artifact("library", {"steps": steps}, {})
        found[steps] = build_serially(str(parent_folder), space, changed(tokens=32 * steps), tokens, 0, step, Quiet())
    return space, found


def test_no_header_grows_with_the_number_of_steps(libraries):
    space, found = libraries
    short, long = (header_sizes(found[steps].artifact) for steps in (8, 200))
    assert set(short) == set(long) == {variant_file(*entry) for entry in space.entries()}
    assert all(long[name] - short[name] <= 64 for name in short), "less than half a byte for each of 192 more steps"
    for name in long:
        assert set(found[200].artifact.read_tensors(name)[1]) == {"row"}


def test_no_header_of_a_checkpoint_grows_with_the_number_of_steps(parent_folder, tmp_path):
    sizes = []
    for steps in (8, 200):
        config = changed(tokens=32 * steps, checkpoint_every=1)
        step = Store(str(tmp_path)).artifact("library", {"steps": steps}, {})
        space = search_space(read_config(parent_folder), *SPACE, 8)
        group = GroupTrainer(str(parent_folder), [1], space, config, step, 1)
        alone = group.trainers[0]
        end = alone.schedule.positions - 1
        run(alone, range(end))
        group.checkpoints.after(end, [alone])
        files = [checkpoint_file(*entry) for entry in space.entries() if entry[0] == 1]
        sizes.append(max(header_size(step, file) for file in files))
        saved = [step.read_tensors(file) for file in files]
        curves = [tensors["curve"] for tensors, _ in saved]
        assert max(map(len, curves)) == steps and all(curve.dtype == torch.float64 for curve in curves)
        assert all("curve" not in json.loads(about["record"]) for _, about in saved)
    assert sizes[1] - sizes[0] <= 64, "though there are 192 more losses"


def test_curves_are_the_trainers_losses_to_the_bit(libraries, parent_folder):
    space, found = libraries
    curves = found[200].curves()
    assert list(curves) == list(space.entries())
    for row in found[200].rows():
        curve = curves[row.layer, row.kind, row.variant]
        assert isinstance(curve, array) and len(curve) * 32 == row.tokens
        tensor = found[200].artifact.read_tensors(variant_file(row.layer, row.kind, row.variant))[0][CURVE]
        assert tensor.tolist() == list(curve)
    table = pq.read_table(io.BytesIO(found[200].artifact.read(CURVES_TABLE))).to_pylist()
    assert {(x["layer"], x["kind"], x["variant"]): x["losses"] for x in table} == {k: list(v) for k, v in curves.items()}
    assert "curves.json" not in found[200].artifact.names()


def test_a_trainer_that_takes_over_has_the_same_curves(parent_folder):
    whole = run(trainer(parent_folder))
    assert any(len(curve) == 8 for _, _, curve in whole.results())
    assert_same(whole, restored(parent_folder, cut=8))


def test_a_curve_is_no_weight(libraries):
    space, found = libraries
    for choice in space.layers[0].choices:
        for states in found[8].states(0, choice).values():
            assert CURVE not in states and "" not in states


def test_any_float_and_a_long_curve_go_through(libraries, tmp_path):
    """A million losses, of which a tenth cannot be written with few digits. One more variant has none."""
    space, found = libraries
    step = Store(str(tmp_path)).artifact("library", {}, {})
    curves = {entry: [] for entry in space.entries()}
    first = next(iter(curves))
    curves[first] = [0.1, 1 / 3, 5e-324, 1e308, *torch.rand(1_000_000, dtype=torch.float64).tolist()]
    for entry, curve in curves.items():
        tensors, about = found[8].artifact.read_tensors(variant_file(*entry))
        step.write_tensors(variant_file(*entry), tensors | {CURVE: torch.tensor(curve, dtype=torch.float64)}, about)
    finish_library(space, step)
    again = Library(step).curves()
    assert {entry: list(curve) for entry, curve in again.items()} == curves
