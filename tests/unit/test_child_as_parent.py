"""A child is a parent like any other: read layer by layer it gives its own logits, and what is made of it is counted from the original."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import OF_FAMILY, save_parent

from puzzle_ray.artifacts import LayerChoice, LayerSpace, SearchSpace
from puzzle_ray.calibration import Statistics
from puzzle_ray.export.target import configured_space
from puzzle_ray.models.blocks import load_stack, logits_layer_by_layer, subblock_state, swapped
from puzzle_ray.models.child import choices_of, load_model, new_child, original_config, read_config, save_child
from puzzle_ray.models.child_files import write_child
from puzzle_ray.models.describe import describe
from puzzle_ray.models.manifest import check_weights
from puzzle_ray.profiling.measure import profile_tasks, subblock_sizes
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.variants.space import SpaceConfig, onward

FAMILIES = sorted({"llama", *OF_FAMILY})
FIRST = (LayerChoice("gqa:1", "ffn:24"), LayerChoice("linear", "noop"), LayerChoice("noop", "linear"))
SECOND = (LayerChoice("parent", "ffn:8"), LayerChoice("noop", "parent"), LayerChoice("parent", "noop"))
BOTH = (LayerChoice("gqa:1", "ffn:8"), LayerChoice("noop", "noop"), LayerChoice("noop", "noop"))
SPACE = SpaceConfig(
    attention=("parent", "gqa:1", "linear", "noop"), ffn=("parent", "ffn:24", "ffn:8", "linear", "noop"), ffn_multiple_of=8
)


@pytest.fixture(params=FAMILIES)
def child(request, tmp_path):
    """The folder of a child with random weights in every layer."""
    parent = save_parent(tmp_path / "parent", request.param)
    torch.manual_seed(1)
    save_child(new_child(read_config(parent), FIRST, torch.float32), parent, tmp_path / "child")
    return tmp_path / "child"


def ids_of(config):
    return torch.arange(24).remainder(config.vocab_size).reshape(2, 12)


@torch.no_grad()
def test_layer_by_layer_it_gives_its_own_logits(child):
    config = read_config(child)
    check_weights(child, config)
    ids, depth = ids_of(config), config.num_hidden_layers
    stack = load_stack(child, describe(config), config, 0, depth, torch.float32)
    hidden = stack.embed(ids)
    for index in range(depth):
        hidden = stack.run_layer(stack.layer(index), index, hidden)
    assert torch.equal(stack.logits(hidden), load_model(child)(ids, use_cache=False).logits)


@torch.no_grad()
def test_a_child_of_a_child_has_the_logits_of_its_parent_with_these_blocks(child, tmp_path):
    config = read_config(child)
    descriptor, ids = describe(config), ids_of(config)
    blocks = {}
    stack = load_stack(child, descriptor, config, 0, config.num_hidden_layers, torch.float32)
    torch.manual_seed(2)
    for index, choice in enumerate(SECOND):
        layer = swapped(stack.layer(index), choice, descriptor, config)
        states = {kind: subblock_state(layer, kind, descriptor) for kind in choice.replaced}
        blocks[index] = {k: {name: 0.2 * torch.randn(value.shape) for name, value in s.items()} for k, s in states.items()}
    folder = tmp_path / "grandchild"
    folder.mkdir()
    write_child(child, config, SECOND, lambda layer, _: blocks[layer], torch.float32, folder)
    exchanged = logits_layer_by_layer(
        child,
        descriptor,
        config,
        torch.float32,
        ids,
        exchange=lambda layer, index: swapped(layer, SECOND[index], descriptor, config, blocks[index]),
    )
    assert choices_of(read_config(folder)) == BOTH
    assert torch.equal(exchanged, load_model(folder)(ids, use_cache=False).logits)


def test_its_variants_are_what_is_less_than_it_is(child):
    space = configured_space(read_config(child), SPACE, "native")
    assert [layer.now for layer in space.layers] == list(FIRST)
    assert [layer.attention for layer in space.layers] == [("parent", "linear", "noop"), ("parent", "noop"), ("parent",)]
    assert [layer.ffn for layer in space.layers] == [("parent", "ffn:8", "linear", "noop"), ("parent",), ("parent", "noop")]


def test_what_its_subblocks_cost_is_profiled_in_the_shapes_of_the_original(child):
    config = read_config(child)
    space, settings = configured_space(config, SPACE, "native"), ProfileConfig()
    sizes = {}
    for task in profile_tasks(space, settings):
        sizes[task.layer_type] = {(s.subblock, s.variant): s for s in subblock_sizes(task, config, settings)}
    params = sum(
        sizes[layer.layer_type][kind, layer.now.variant(kind)].num_params
        for layer in space.layers
        for kind in ("attention", "ffn")
    )
    fixed = next(iter(sizes.values()))["fixed", "fixed"].num_params
    assert params + fixed == load_model(child).num_parameters()


@torch.no_grad()
def test_statistics_pass_over_what_is_no_attention_and_no_ffn(child):
    config = read_config(child)
    descriptor = describe(config)
    stack = load_stack(child, descriptor, config, 0, 2, torch.float32)
    hidden = stack.embed(ids_of(config))
    for index, tokens in ((0, 24), (1, 0)):
        statistics = Statistics()
        with statistics.watch(stack.layer(index), descriptor):
            hidden = stack.run_layer(stack.layer(index), index, hidden)
        assert statistics.tokens == tokens


def test_the_original_config_is_the_parents(child):
    parent, original = read_config(child.parent / "parent"), original_config(read_config(child))
    differing = {"architectures", "transformers_version", "num_key_value_heads", "intermediate_size", "dtype", "_name_or_path"}
    assert type(original) is type(parent)
    assert {k: v for k, v in original.to_dict().items() if k not in differing} == {
        k: v for k, v in parent.to_dict().items() if k not in differing
    }


@pytest.mark.parametrize(
    ("now", "attention"),
    [
        (LayerChoice(), ("parent", "gqa:4", "gqa_prune:2", "window:8", "linear", "noop")),
        (LayerChoice("gqa:4"), ("parent", "gqa_prune:2", "linear", "noop")),
        (LayerChoice("gqa_prune:2"), ("parent", "linear", "noop")),
        (LayerChoice("window:8"), ("parent", "linear", "noop")),
        (LayerChoice("some.package:MINE"), ("parent", "noop")),
        (LayerChoice("linear"), ("parent", "noop")),
        (LayerChoice("noop"), ("parent",)),
    ],
)
def test_less_means_fewer_heads_a_matrix_or_nothing(now, attention):
    layer = LayerSpace(("parent", "gqa:4", "gqa_prune:2", "window:8", "linear", "noop"), ("parent",))
    assert onward(layer, now) == replace(layer, attention=attention, now=now)


def test_a_space_is_read_back_with_what_its_layers_are():
    from puzzle_ray.artifacts import to_json

    space = SearchSpace((LayerSpace(("parent", "noop"), ("parent",), now=LayerChoice("gqa:1", "ffn:8")),))
    assert SearchSpace.from_json(to_json(space)) == space
