"""Variants beyond the parametrised surgery tests: what each starts from, windows with and without a cache, a user's own."""

import importlib
import itertools
import json
import re
import sys
import textwrap

import pytest
import torch
from small_models import save_parent, tiny_config

from puzzle_ray.artifacts import KINDS, PARENT, LayerChoice, LayerSpace, SearchSpace
from puzzle_ray.calibration import DAMPINGS, Moments, Statistics, largest_damping, refit, refit_error, refit_well
from puzzle_ray.data.order import Tokens
from puzzle_ray.distill.library import build_serially
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.errors import ConfigError
from puzzle_ray.models.blocks import load_stack, subblock_state, swapped
from puzzle_ray.models.child import assemble, load_model, new_child, read_config, save_child
from puzzle_ray.models.describe import describe
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store
from puzzle_ray.surgery.kv_cache import cache_from, continuing
from puzzle_ray.surgery.projections import AttentionProjections, FFNProjections
from puzzle_ray.variants import base as variants
from puzzle_ray.variants.base import find_variant, resolve_variant
from puzzle_ray.variants.ffn_iterative import most_missed
from puzzle_ray.variants.gqa_prune import importance_K
from puzzle_ray.variants.space import search_space

IDS = torch.arange(60).remainder(96).reshape(2, 30)
WINDOWED = ("gpt2", "llama", "olmo2", "opt", "phi3")


def whole(folder):
    config = read_config(folder)
    return load_stack(folder, describe(config), config, 0, config.num_hidden_layers, torch.float32)


def started(stack, choice, hidden, index=0):
    """(layer of `choice`, what its variants said, the statistics they started from)."""
    layer, statistics = stack.layer(index), Statistics()
    with torch.no_grad(), statistics.watch(layer, stack.descriptor):
        stack.run_layer(layer, index, hidden)
    child = swapped(layer, choice, stack.descriptor, stack.config)
    words = {}
    for kind in KINDS:
        variant, argument = find_variant(choice.variant(kind), kind)
        words[kind] = variant.initialise(child, layer, argument, kind, stack.descriptor, statistics)
    return child, words, statistics


def damage(stack, choice, hidden):
    """Squared difference of a started variant's layer from the parent's, on the tokens it was started from."""
    with torch.no_grad():
        child, _, _ = started(stack, choice, hidden)
        return float((stack.run_layer(child, 0, hidden) - stack.run_layer(stack.layer(0), 0, hidden)).square().sum())


# --- key-value heads


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "opt"])
@torch.no_grad()
def test_pruned_heads_are_copies_and_a_head_that_says_nothing_goes_first_at_no_loss(model_type, tmp_path):
    stack = whole(save_parent(tmp_path, model_type))
    parent = AttentionProjections.of(stack.layer(0), stack.descriptor)
    width = parent.output.weight_OI.shape[1] // parent.num_kv_heads
    parent.output.weight_OI[:, :width] = 0  # nothing that the query heads of KV head 0 say is heard
    hidden = torch.randn(4, 16, 32)
    keep = parent.num_kv_heads // 2
    layer, words, statistics = started(stack, LayerChoice(f"gqa_prune:{keep}"), hidden)
    importance = importance_K(parent, statistics.head_moment)
    kept = sorted(importance.argsort(descending=True)[:keep].tolist())
    assert importance[0] == 0 and 0 not in kept and words["attention"].startswith(f"kept heads {', '.join(map(str, kept))}")
    new = AttentionProjections.of(layer, stack.descriptor)
    for row, head in enumerate(kept):
        old_rows = parent.key.weight_OI[head * 8 : head * 8 + 8]
        assert torch.equal(new.key.weight_OI[row * 8 : row * 8 + 8], old_rows)
    if parent.num_kv_heads == 2:  # then only the silent head went
        assert torch.allclose(stack.run_layer(layer, 0, hidden), stack.run_layer(stack.layer(0), 0, hidden), atol=1e-4)


@torch.no_grad()
def test_importance_is_the_mean_square_of_what_a_kv_head_adds_to_the_residual(parent_folder):
    stack = whole(parent_folder)
    entering = []
    handle = stack.layer(0).self_attn.o_proj.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    _, _, statistics = started(stack, LayerChoice("gqa_prune:1"), torch.randn(3, 16, 32))
    handle.remove()
    parent = AttentionProjections.of(stack.layer(0), stack.descriptor)
    z, w = entering[0].flatten(0, 1), parent.output.weight_OI
    expected = [(z[:, s : s + 16] @ w[:, s : s + 16].T).square().sum() for s in (0, 16)]
    assert torch.allclose(importance_K(parent, statistics.head_moment).float(), torch.stack(expected), rtol=1e-4)


# --- FFN


def test_least_missed_agrees_with_trying_every_set_in_one_step():
    """Dropping one channel at a time, each drop is the best single one after refitting."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator).double()
    x[:, 5] = x[:, 4] + 0.01 * x[:, 3]  # nearly the same channel twice
    weight, moment = torch.randn(3, 6, generator=generator).double(), x.T @ x

    def error(kept):
        return float((x @ weight.T - x[:, kept] @ refit(weight, moment, torch.tensor(kept)).T).square().sum())

    best = min(itertools.combinations(range(6), 5), key=error)
    assert tuple(most_missed(weight, moment, 5, rounds=1).tolist()) == best and len({4, 5} & set(best)) == 1
    assert error(best) < 0.01 * min(error(kept) for kept in itertools.combinations((0, 1, 2, 3, 4, 5), 5) if {4, 5} <= set(kept))


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "opt"])
def test_iterative_ffn_does_less_damage_than_channels_judged_alone(model_type, tmp_path):
    stack = whole(save_parent(tmp_path, model_type))
    hidden = torch.randn(8, 32, 32)
    assert damage(stack, LayerChoice(ffn="ffn_iterative:24"), hidden) < damage(stack, LayerChoice(ffn="ffn:24"), hidden)


@torch.no_grad()
def test_refit_keeps_the_weights_when_nothing_goes(parent_folder):
    stack = whole(parent_folder)
    _, _, statistics = started(stack, LayerChoice(ffn="ffn:8"), torch.randn(2, 16, 32))
    weight = FFNProjections.of(stack.layer(0), stack.descriptor).down.weight_OI
    assert torch.equal(refit(weight, statistics.channel_moment, torch.arange(48)), weight.double())


# --- linear


def test_least_squares_with_a_bias_finds_an_affine_map():
    x = torch.randn(100, 4)
    weight, bias = torch.randn(3, 4), torch.randn(3)
    moments = Moments()
    moments.add(x, x @ weight.T + bias)
    found = moments.least_squares(bias=True)
    assert torch.allclose(found.float(), torch.cat([weight, bias[:, None]], dim=1), atol=1e-3)
    assert moments.relative_error(found) < 1e-6 < moments.relative_error(moments.least_squares())


def test_moments_of_many_batches_are_exact_enough_for_the_least_damping():
    """Products are float32, their sum is not: with one outlier feature, a float32 sum ruins what is a millionth of its size."""
    torch.manual_seed(0)
    scale, moments, exact, plain = torch.logspace(0, -3, 16), Moments(), 0, 0
    scale[0] = 100
    mix, weight = torch.linalg.qr(torch.randn(16, 16))[0], torch.randn(16, 16)
    for _ in range(256):
        z = torch.randn(64, 16) * scale
        x, y = z @ mix, z @ (weight / scale[:, None] ** 0.5)
        moments.add(x, y)
        exact, plain = exact + x.double().T @ x.double(), plain + x.T @ x
    errors = [float((found[:16, :16].double() - exact).norm() / exact.norm()) for found in (moments.xx, plain)]
    assert errors[0] < 3e-8 < errors[1]


def test_linear_starts_are_judged_on_tokens_the_least_squares_did_not_see(parent_folder):
    """With fewer calibration tokens than inputs, least squares fits its own half perfectly and is found out on the other."""
    stack = whole(parent_folder)
    torch.manual_seed(0)
    _, words, statistics = started(stack, LayerChoice(ffn="linear"), torch.randn(1, 16, 32))
    seen, unseen = statistics.halves["ffn"]
    assert seen.relative_error(seen.least_squares()) < 1e-3 < 0.1 < unseen.relative_error(seen.least_squares())
    errors = {damping: unseen.relative_error(seen.least_squares(damping=damping)) for damping in DAMPINGS}
    damping = max(damping for damping, error in errors.items() if error <= 1.03 * min(errors.values()))
    assert f"least squares {errors[damping]:.3f}, damping {damping:g}" in words["ffn"].replace("(relative error ", "")


def test_an_input_that_hardly_varies_does_not_make_a_huge_matrix():
    """A direction of next to no variance is fitted to noise, with entries that cancel, unless it is damped."""
    torch.manual_seed(0)
    x = torch.randn(4000, 16)
    x[:, 0] = x[:, 1] + 1e-4 * torch.randn(4000)
    y = x @ torch.randn(16, 16) + 0.3 * torch.randn(4000, 16)
    halves = (Moments(), Moments())
    for moments, part in zip(halves, (slice(0, 2000), slice(2000, None)), strict=True):
        moments.add(x[part], y[part])
    seen, unseen = halves
    damping, error = largest_damping(lambda d: unseen.relative_error(seen.least_squares(damping=d)))
    undamped, damped = (torch.linalg.matrix_norm(seen.least_squares(damping=d), 2) for d in (1e-12, damping))
    assert damped < 10 < undamped and damping >= 1e-3
    assert error <= 1.03 * min(unseen.relative_error(seen.least_squares(damping=d)) for d in DAMPINGS) + 1e-9


def test_refitted_weights_are_damped_by_what_does_well_on_unseen_tokens():
    torch.manual_seed(0)
    x, weight, kept = torch.randn(3000, 12), torch.randn(8, 12), torch.tensor([0, 2, 3, 5, 7])
    x[:, 7] = x[:, 5] + 1e-5 * torch.randn(3000)
    halves = [(part.T @ part).double() for part in (x[:1500], x[1500:])]
    fitted, damping = refit_well(weight, halves, kept)
    errors = [refit_error(weight, halves[1], kept, refit(weight, halves[0], kept, d)) for d in DAMPINGS]
    assert errors[DAMPINGS.index(damping)] <= 1.03 * min(errors) and torch.equal(
        fitted, refit(weight, sum(halves), kept, damping)
    )
    by_hand = (x.double() @ weight.double().T - x[:, kept].double() @ fitted.T).square().sum() / (
        x.double() @ weight.double().T
    ).square().sum()
    assert refit_error(weight, sum(halves), kept, fitted) == pytest.approx(float(by_hand), rel=1e-4)


def test_halves_make_the_whole(parent_folder):
    stack = whole(parent_folder)
    _, _, statistics = started(stack, LayerChoice("linear"), torch.randn(3, 5, 32))
    moments, (first, second) = statistics.moments["attention"], statistics.halves["attention"]
    assert torch.equal(moments.xx, first.xx + second.xx) and first.xx[-1, -1] == 8 and moments.xx[-1, -1] == 15


def test_only_the_statistics_that_are_needed_are_gathered(parent_folder):
    stack = whole(parent_folder)
    needed = variants.needed_statistics(["parent", "gqa_prune:1", "noop"], "attention") | variants.needed_statistics(
        ["ffn:8"], "ffn"
    )
    statistics = Statistics(needed)
    with torch.no_grad(), statistics.watch(stack.layer(0), stack.descriptor):
        stack.run_layer(stack.layer(0), 0, torch.randn(1, 8, 32))
    assert needed == {"heads"} and statistics.head_moment is not None and statistics.channel_moment is None
    assert statistics.halves["ffn"][0].xx is None and statistics.channel_mean_F.shape == (48,)


# --- windows


@pytest.mark.parametrize("model_type", WINDOWED)
@torch.no_grad()
def test_a_window_sees_the_last_w_tokens_and_no_more(model_type, tmp_path):
    stack = whole(save_parent(tmp_path, model_type))
    hidden = torch.randn(1, 20, 32)
    layer, _, _ = started(stack, LayerChoice("window:5"), hidden)
    changed = hidden.clone()
    changed[:, 8] = torch.randn(32)
    moved = (stack.run_layer(layer, 0, changed) - stack.run_layer(layer, 0, hidden)).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == [8 <= t < 8 + 5 for t in range(20)]
    wide = swapped(stack.layer(0), LayerChoice("window:20"), stack.descriptor, stack.config)
    assert torch.equal(stack.run_layer(wide, 0, hidden), stack.run_layer(stack.layer(0), 0, hidden))


def test_a_window_equals_mistrals_own(tmp_path):
    """Every layer windowed is transformers' sliding-window Mistral, logits and generated tokens alike."""
    own = save_parent(tmp_path / "own", "mistral", sliding_window=6)
    full = save_parent(tmp_path / "full", "mistral", sliding_window=None)
    config = read_config(full)
    stack = whole(full)
    states = {(i, "attention"): subblock_state(stack.layer(i), "attention", stack.descriptor) for i in range(3)}
    child, reference = assemble(full, config, [LayerChoice("window:6")] * 3, states, torch.float32), load_model(own)
    with torch.no_grad():
        assert torch.allclose(child(IDS).logits, reference(IDS).logits, atol=1e-5)
    assert torch.equal(generated(child, 20), generated(reference, 20))


def generated(model, tokens, prompt=None, **settings):
    ids = IDS[:, :7] if prompt is None else prompt
    settings = {"attention_mask": torch.ones_like(ids)} | settings
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=1, eos_token_id=None, **settings)


@pytest.mark.parametrize("model_type", WINDOWED)
@torch.no_grad()
def test_windows_decode_with_a_cache_as_without_and_keep_no_more_than_the_window(model_type, tmp_path):
    config = tiny_config(model_type)
    torch.manual_seed(0)
    choices = [LayerChoice("window:4"), LayerChoice("parent", "noop"), LayerChoice("window:9")]
    child = new_child(config, choices, torch.float32).eval()
    for parameter in child.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.25)
    child.save_pretrained(tmp_path)
    child = load_model(tmp_path)
    ids = IDS[:, :7]
    for _ in range(12):
        ids = torch.cat([ids, child(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated(child, 12), ids)
    cache = cache_from(child(ids, use_cache=True))
    assert [layer.keys.shape[2] for layer in cache.layers] == [3, ids.shape[1], 8]
    chunk = child(IDS[:, :5], **continuing(cache)).logits
    assert torch.allclose(chunk, child(torch.cat([ids, IDS[:, :5]], 1), use_cache=False).logits[:, -5:], atol=1e-4)
    assert torch.equal(generated(child, 12, cache_implementation="static", disable_compile=True), ids)


@torch.no_grad()
def test_windows_heed_left_padding(tmp_path):
    torch.manual_seed(0)
    child = new_child(tiny_config(), [LayerChoice("window:4"), LayerChoice("window:4"), LayerChoice()], torch.float32).eval()
    prompt = IDS[:1, :6]
    padded = torch.cat([torch.ones(1, 3, dtype=torch.long), prompt], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    alone = generated(child, 8, prompt)
    assert torch.equal(generated(child, 8, padded, attention_mask=mask)[:, 3:], alone)


# --- settings


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("gqa_prune:3", "attention", "gqa_prune:3: 3 does not divide 4 KV heads; use one of 1, 2"),
        ("ffn:20", "ffn", "ffn:20 is no multiple of ffn_multiple_of=8; write ffn:16 or ffn:24"),
        ("ffn:5", "ffn", "write ffn:8, or change space.ffn_multiple_of"),
        ("ffn_iterative:20", "ffn", "ffn_iterative:20 is no multiple"),
        ("window:1", "attention", "too short"),
        ("noop:3", "attention", "space.attention: noop has no sizes, and noop:3 asks for one; write noop"),
        ("linear:50%", "ffn", "space.ffn: linear has no sizes, and linear:50% asks for one; write linear"),
        ("parent:3", "ffn", "parent has no sizes"),
        ("window:x", "attention", "neither a number nor a percentage"),
        ("collections:OrderedDict", "ffn", "unknown variant 'collections'"),
        ("os.path:join", "ffn", "is no variant: it lacks name, kinds"),
        ("os.path:nothing", "ffn", "cannot be imported"),
    ],
)
def test_wrong_settings_are_explained_before_work(name, kind, words):
    with pytest.raises(ConfigError, match=words):
        resolve_variant(name, kind, tiny_config(num_key_value_heads=4), 8)


def test_the_parents_own_width_need_be_no_multiple():
    assert resolve_variant("ffn:48", "ffn", tiny_config(), 5) == "parent"


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "gpt_neo"])
def test_windows_are_refused_where_the_parent_has_its_own(model_type):
    with pytest.raises(ConfigError, match="sliding windows of its own"):
        resolve_variant("window:8", "attention", tiny_config(model_type), 8)


# --- a user's own


# the one that the documentation shows, word for word
PACKAGE = textwrap.dedent(re.search(r"^    import torch\n.*^    VARIANT = LowRank\(\)\n", variants.__doc__, re.M | re.S)[0])


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    """An installed package `our_variants` with one variant, offered as the entry point `low_rank` too."""
    (tmp_path / "our_variants").mkdir()
    (tmp_path / "our_variants/__init__.py").write_text("")
    (tmp_path / "our_variants/low_rank.py").write_text(PACKAGE)
    information = tmp_path / "our_variants-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: our-variants\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[puzzle_ray.variants]\nlow_rank = our_variants.low_rank:VARIANT\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    variants._plugins.cache_clear()
    yield
    variants._plugins.cache_clear()
    for name in [name for name in sys.modules if name.startswith("our_variants")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["our_variants.low_rank:VARIANT:4", "low_rank:4"])
def test_a_users_own_variant_goes_all_the_way(name, own_package, parent_folder, tmp_path):
    config = read_config(parent_folder)
    space = search_space(config, (), (name, "noop"), 8)
    assert space.layers[0].ffn == (PARENT, name, "noop")
    only = SearchSpace(tuple(LayerSpace((PARENT,), (PARENT, name)) for _ in range(3)))
    settings = LibraryConfig(
        tokens=512, calibration_tokens=64, validation_tokens=64, micro_batch_tokens=64, learning_rate=3e-3, checkpoint_every=100
    )
    tokens = Tokens(torch.randint(96, (24, 16), generator=torch.Generator().manual_seed(0)).numpy())
    step = Store(str(tmp_path / "store")).artifact("library", {}, {})
    library = build_serially(str(parent_folder), only, settings, tokens, 0, step, Quiet())
    rows = library.rows()
    assert [(row.layer, row.variant, row.initialisation, row.failure) for row in rows] == [
        (index, name, "singular values", "") for index in range(3)
    ]
    assert all(row.kept == "trained" and row.final_loss < row.start_loss for row in rows)
    choices = [LayerChoice(ffn=name)] * 2 + [LayerChoice()]
    trained = {(i, "ffn"): library.states(i, c)["ffn"] for i, c in enumerate(choices[:2])}
    child = assemble(parent_folder, config, choices, trained, torch.float32)
    save_child(child, parent_folder, tmp_path / "child")
    loaded = load_model(tmp_path / "child")
    assert torch.equal(loaded(IDS).logits, child(IDS).logits)
    assert loaded.model.layers[0].mlp.down_proj[0].weight.shape == (4, 48)
    assert json.loads((tmp_path / "child/config.json").read_text())["puzzle_layers"][0]["ffn"] == name


def test_a_taken_name_is_refused(own_package, tmp_path):
    points = tmp_path / "our_variants-1.0.dist-info/entry_points.txt"
    points.write_text("[puzzle_ray.variants]\ngqa = our_variants.low_rank:VARIANT\n")
    with pytest.raises(ConfigError, match="two variants are named 'gqa'"):
        find_variant("low_rank:4", "ffn")


def test_a_damping_is_found_where_rounding_leaves_errors_below_zero():
    """As on text of one token over and over, which any matrix of rank one fits."""
    assert largest_damping(lambda damping: -1e-6) == (max(DAMPINGS), 0.0)
