"""Surgery: every variant of every family builds, runs, saves and loads; the all-parent child is the parent, bit for bit."""

import pytest
import torch
from small_models import save_parent, tiny_config

from puzzle_ray.artifacts import KINDS, PARENT, LayerChoice
from puzzle_ray.calibration import Statistics
from puzzle_ray.errors import ConfigError, ParentError
from puzzle_ray.families.registry import families
from puzzle_ray.models.blocks import load_stack, load_subblock, subblock_state, swapped
from puzzle_ray.models.checkpoint import Checkpoint, fingerprint, locate
from puzzle_ray.models.child import assemble, load_model, new_child, read_config, save_child
from puzzle_ray.models.describe import describe
from puzzle_ray.variants.base import find_variant, resolve_variant
from puzzle_ray.variants.space import search_space

ATTENTION = ("parent", "gqa:50%", "gqa_prune:50%", "linear", "noop")
FFN = ("parent", "ffn:50%", "ffn:25%", "ffn_iterative:50%", "linear", "noop")
IDS = torch.arange(40).remainder(96).reshape(2, 20)


@pytest.fixture(scope="module", params=sorted(families()))
def family(request, tmp_path_factory):
    folder = save_parent(tmp_path_factory.mktemp(request.param), request.param)
    config = read_config(folder)
    return folder, config, describe(config), search_space(config, ATTENTION, FFN, 4)


def whole_stack(folder, config, descriptor):
    return load_stack(folder, descriptor, config, 0, config.num_hidden_layers, torch.float32)


def initialised(stack, index, choice, hidden):
    """A layer with `choice`, started from statistics on `hidden`."""
    statistics = Statistics()
    with torch.no_grad(), statistics.watch(stack.layer(index), stack.descriptor):
        stack.run_layer(stack.layer(index), index, hidden)
    child = swapped(stack.layer(index), choice, stack.descriptor, stack.config)
    for kind in KINDS:
        variant, argument = find_variant(choice.variant(kind), kind)
        variant.initialise(child, stack.layer(index), argument, kind, stack.descriptor, statistics)
    return child


@torch.no_grad()
def test_a_model_cut_into_stacks_gives_the_whole_models_logits(family):
    folder, config, descriptor, _ = family
    reference = load_model(folder, torch.float32)(IDS).logits
    hidden = None
    for first, last in ((0, 1), (1, 3)):
        stack = load_stack(folder, descriptor, config, first, last, torch.float32)
        hidden = stack.embed(IDS) if first == 0 else hidden
        for index in range(first, last):
            hidden = stack.run_layer(stack.layer(index), index, hidden)
    assert torch.equal(stack.logits(hidden), reference)


@torch.no_grad()
def test_all_parent_child_is_the_parent(family):
    folder, config, _, _ = family
    child = assemble(folder, config, [LayerChoice()] * 3, {}, torch.float32)
    assert torch.equal(child(IDS).logits, load_model(folder, torch.float32)(IDS).logits)


def test_every_variant_runs_forward_and_backward_and_its_weights_round_trip(family):
    folder, config, descriptor, space = family
    stack = whole_stack(folder, config, descriptor)
    hidden = torch.randn(2, 12, config.hidden_size)
    for choice in space.layers[1].choices:
        layer = initialised(stack, 1, choice, hidden)
        out = stack.run_layer(layer, 1, hidden.clone().requires_grad_())
        assert out.shape == hidden.shape and torch.isfinite(out).all()
        if choice != LayerChoice("noop", "noop"):
            out.square().mean().backward()
        states = {kind: subblock_state(layer, kind, descriptor) for kind in KINDS if choice.variant(kind) != PARENT}
        again = swapped(stack.layer(1), choice, descriptor, config, states)
        with torch.no_grad():
            assert torch.equal(stack.run_layer(again, 1, hidden), out)


@torch.no_grad()
def test_a_mixed_child_saves_loads_and_generates_with_a_cache_as_without(family, tmp_path):
    folder, config, descriptor, space = family
    stack = whole_stack(folder, config, descriptor)
    choices = [
        LayerChoice("noop", "parent"),
        LayerChoice(space.layers[1].attention[1], space.layers[1].ffn[1]),
        LayerChoice("linear", "linear"),
    ]
    trained, hidden = {}, stack.embed(IDS)
    for index, choice in enumerate(choices):
        layer = initialised(stack, index, choice, hidden)
        trained |= {(index, k): subblock_state(layer, k, descriptor) for k in KINDS if choice.variant(k) != PARENT}
    child = assemble(folder, config, choices, trained, torch.float32)
    save_child(child, folder, tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(IDS).logits, child(IDS).logits)
    cached = loaded.generate(
        IDS[:, :7],
        attention_mask=torch.ones_like(IDS[:, :7]),
        max_new_tokens=9,
        do_sample=False,
        pad_token_id=1,
        eos_token_id=None,
    )
    ids = IDS[:, :7]
    for _ in range(9):
        ids = torch.cat([ids, loaded(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, ids)


@torch.no_grad()
def test_swapped_shares_what_stays_and_leaves_the_parent_alone(family):
    folder, config, descriptor, _ = family
    stack = whole_stack(folder, config, descriptor)
    before = {k: v.clone() for k, v in stack.layer(0).state_dict().items()}
    child = swapped(stack.layer(0), LayerChoice(ffn="noop"), descriptor, config)
    assert getattr(child, descriptor.attention) is getattr(stack.layer(0), descriptor.attention)
    assert all(torch.equal(v, stack.layer(0).state_dict()[k]) for k, v in before.items())


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["opt", "gpt_neo", "llama"])
def test_a_swapped_layer_drops_nothing_out(model_type, tmp_path):
    """Whatever the parent was trained with: a new module begins in training mode."""
    folder = save_parent(tmp_path, model_type, attention_dropout=0.5)
    config = read_config(folder)
    stack = load_stack(folder, describe(config), config, 0, 3, torch.float32)
    layer = swapped(stack.layer(0), LayerChoice("gqa:1", "ffn:24"), stack.descriptor, config)
    assert not [name for name, module in layer.named_modules() if module.training]
    layer.load_state_dict({name: torch.ones_like(value) / 8 for name, value in layer.state_dict().items()})
    hidden = stack.embed(torch.arange(20)[None])
    assert torch.equal(stack.run_layer(layer, 0, hidden), stack.run_layer(layer, 0, hidden))


def test_a_loaded_stack_holds_only_its_own_layers(parent_folder):
    config = read_config(parent_folder)
    names = set(load_stack(parent_folder, describe(config), config, 1, 2, torch.float32).state_dict())
    assert names and all(name.startswith("layers.0.") for name in names)


def test_pooled_heads_are_means_of_their_group(parent_folder):
    config = read_config(parent_folder)
    stack = whole_stack(parent_folder, config, describe(config))
    layer = initialised(stack, 0, LayerChoice("gqa:1"), torch.randn(1, 8, 32))
    old, new = stack.layer(0).self_attn.k_proj.weight, layer.self_attn.k_proj.weight
    assert torch.allclose(new, (old[:8] + old[8:]) / 2)


def test_ffn_keeps_the_channels_that_contribute_most(parent_folder):
    config = read_config(parent_folder)
    stack = whole_stack(parent_folder, config, describe(config))
    mlp = stack.layer(0).mlp
    with torch.no_grad():
        mlp.down_proj.weight[:, 10:] = 0  # channels 10.. contribute nothing
    layer = initialised(stack, 0, LayerChoice(ffn="ffn:10"), torch.randn(1, 8, 32))
    assert torch.equal(layer.mlp.up_proj.weight, mlp.up_proj.weight[:10])


def test_linear_start_is_exact_where_the_subblock_is_linear(parent_folder):
    """With attention that only sees values of one token, least squares finds the linear map."""
    config = read_config(parent_folder)
    stack = whole_stack(parent_folder, config, describe(config))
    hidden = torch.randn(64, 1, 32)  # sequences of one token: attention is O . V exactly
    layer = initialised(stack, 0, LayerChoice("linear"), hidden)
    with torch.no_grad():
        assert torch.allclose(stack.run_layer(layer, 0, hidden), stack.run_layer(stack.layer(0), 0, hidden), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("gqa:3", "attention", "outside 1 ... 2|does not divide"),
        ("gqa:x", "attention", "neither a number nor a percentage"),
        ("gqq:1", "attention", "did you mean 'gqa'"),
        ("gqa:1", "ffn", "not for the ffn subblock"),
        ("ffn:200%", "ffn", "outside 1 ... 48"),
        ("no.such:THING", "ffn", "cannot be imported"),
    ],
)
def test_wrong_variant_names_are_explained(name, kind, words):
    with pytest.raises(ConfigError, match=words):
        resolve_variant(name, kind, tiny_config(), 8)


def test_a_kv_count_that_does_not_divide_names_those_that_do():
    with pytest.raises(ConfigError, match="use one of 1, 2"):
        resolve_variant("gqa:3", "attention", tiny_config(num_key_value_heads=4), 8)


def test_percentages_become_canonical_names_without_repeats():
    space = search_space(tiny_config(), ("gqa:50%", "gqa:1", "gqa:100%"), ("ffn:50%", "ffn:24"), 8)
    assert space.layers[0].attention == ("parent", "gqa:1") and space.layers[0].ffn == ("parent", "ffn:24")


def test_unsupported_family_and_missing_folder(tmp_path):
    from transformers import BloomConfig

    with pytest.raises(ParentError, match="family 'bloom' is not supported: .*; supported: .*llama"):
        describe(BloomConfig())
    with pytest.raises(ParentError, match="there is no folder"):
        locate(str(tmp_path / "absent"))
    with pytest.raises(ParentError, match="has no config.json"):
        locate(str(tmp_path))


def test_missing_tensor_is_named(parent_folder):
    with pytest.raises(ParentError, match="no tensor 'nothing'"):
        list(Checkpoint(parent_folder).read(["nothing"]))


def test_fingerprint_follows_content(parent_folder, tmp_path):
    other = save_parent(tmp_path, seed=1)
    assert fingerprint(parent_folder) == fingerprint(parent_folder) != fingerprint(other)


def test_subblock_of_another_shape_is_refused(parent_folder):
    config = read_config(parent_folder)
    descriptor = describe(config)
    child = new_child(config, [LayerChoice(ffn="ffn:8"), LayerChoice(), LayerChoice()], torch.float32)
    narrow = subblock_state(child.model.layers[0], "ffn", descriptor)
    with pytest.raises(ValueError, match="gate_proj.weight is .8, 32., expected .48, 32."):
        load_subblock(child.model.layers[1], "ffn", descriptor, narrow)


def test_a_real_model_loads_in_pieces_bit_equal(shared_data):
    folder = shared_data / "stories260K"
    config = read_config(folder)
    stack = whole_stack(folder, config, describe(config))
    with torch.no_grad():
        hidden = stack.embed(IDS)
        for index in range(5):
            hidden = stack.run_layer(stack.layer(index), index, hidden)
        assert torch.equal(stack.logits(hidden), load_model(folder)(IDS).logits)


@pytest.mark.parametrize(("whole", "name"), [(3, "gqa:1"), (5, "gqa:1"), (6, "gqa:3"), (8, "gqa:4")])
def test_a_percentage_of_the_heads_is_the_nearest_count_that_divides(whole, name):
    assert (
        resolve_variant(
            "gqa:50%",
            "attention",
            tiny_config(num_key_value_heads=whole, num_attention_heads=2 * whole, hidden_size=16 * whole),
            8,
        )
        == name
    )
