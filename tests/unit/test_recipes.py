"""Every recipe loads, is planned without a hub, and fits the cluster that it is for; the bytes are those of hand arithmetic."""

import pytest
from typer.testing import CliRunner

from jobs.plan import table
from puzzle_ray.config import load, recipes
from puzzle_ray.distill.range_test import trial_steps
from puzzle_ray.export.target import configured_space
from puzzle_ray.planning.demand import Sizes, demands, works
from puzzle_ray.planning.hardware import Hardware, problems
from puzzle_ray.planning.settled import settle
from puzzle_ray.profiling.batch_sizes import with_batch_sizes
from puzzle_ray.recipes.shapes import published_config

LARGE = {"llama31_8b": "1x8 H100-80GB", "llama33_70b": "8x8 H100-80GB"}


def planned(recipe, cluster, *overrides):
    asked, hardware = load(recipe, None, overrides), Hardware.parse(cluster)
    model_config = published_config(asked.parent)
    found = settle(asked, model_config, hardware.as_nodes(), None)
    sizes = Sizes(model_config, configured_space(model_config, asked.space, asked.search.target_format))
    needed = demands(found.config, model_config, sizes, hardware.gpu_bytes)
    return found, {(d.stage, d.process): d for d in needed}, works(found.config, model_config, sizes), hardware, sizes


def test_every_recipe_loads_alone_and_under_the_papers_losses():
    assert set(recipes()) >= {"tiny", "llama31_8b", "llama33_70b", "paper"}
    for name in recipes():
        assert load(f"{name},paper").library.loss.cosine == 0
        load(name)


def test_the_papers_losses_are_those_of_its_sections():
    found, own = load("llama33_70b,paper"), load("llama33_70b")
    assert (found.library.loss.block, found.library.loss.subblock, found.library.loss.cosine) == (1, 0, 0)
    assert (found.gkd.kl_weight, found.gkd.cosine_weight, found.gkd.lm_weight) == (1, 1, 0)
    assert found.gkd.cosine_reduction == "sum" and own.gkd.cosine_reduction == "mean"
    changed = {"library": own.library, "gkd": own.gkd}
    assert found.model_copy(update=changed) == own, "and nothing else"


@pytest.mark.parametrize("recipe", LARGE)
def test_a_large_recipe_has_the_papers_space_and_fits_its_cluster(recipe):
    found, needed, work, hardware, sizes = planned(recipe, LARGE[recipe])
    layer = sizes.space.layers[0]
    assert len(layer.attention) * len(layer.ffn) == 6 * 9
    assert not problems(list(needed.values()), hardware) and not found.warnings
    assert table(list(needed.values()), work, hardware, 0.4)[-1] == "every process fits the GPUs that it is given"
    gkd = found.config.gkd
    assert gkd.num_workers == hardware.num_gpus
    assert gkd.num_workers * gkd.micro_batch_tokens * gkd.gradient_accumulation == load(recipe).gkd.step_tokens
    assert found.config.library.tokens == 10**9
    profile = with_batch_sizes(found.config.profile, sizes.config, sizes.space, None)
    assert profile.scenario.batch_size >= 1 and profile.memory_mib == 81_559


@pytest.mark.parametrize("recipe", LARGE)
def test_the_bytes_of_a_large_recipe_are_those_of_hand_arithmetic(recipe):
    found, needed, work, hardware, sizes = planned(recipe, LARGE[recipe])
    config, model = found.config, sizes.config
    L, d, f, v, kv = model.num_hidden_layers, model.hidden_size, model.intermediate_size, model.vocab_size, 128
    heads = (4, 2, 1)
    norms = d  # the norm in front of a subblock goes with it
    gqa = [2 * d * d + 2 * d * kv * h + norms for h in heads]
    widths = [round(f * share / 256) * 256 for share in (0.87, 0.75, 0.5, 0.25, 0.2, 0.1)]
    variants = [*gqa, d * d + norms, *(3 * d * w + norms for w in widths), d * d + norms]
    parent = 2 * d * d + 2 * d * kv * 8 + 3 * d * f + 2 * d
    each = -(-L // hardware.num_gpus)
    shards = -(-L // each)
    both = needed["library", "shard, trainers"]
    assert both.count == shards == config.cluster.num_shards
    assert both.parts["variants"] == pytest.approx(4 * each * sum(variants), rel=2e-3)
    assert both.parts["optimizer"] == 2 * both.parts["variants"] == 2 * both.host["start weights"]
    assert both.parts["gradients"] == pytest.approx(4 * max(variants), rel=2e-3), "one variant at a time"
    assert both.parts["parent layer"] == 4 * each * parent
    assert both.parts["weights"] == 2 * (each * parent + v * d + d), "the last shard, with norm and head"
    tokens = config.library.micro_batch_tokens
    assert both.parts["hidden states"] == (each + 1) * tokens * d * 2
    outputs = 2 * d + 2 * kv * 8 + 2 * f + d
    kept = 2 * 2 * outputs + 16 * d + 7 * 4 * d
    assert both.parts["activations"] == tokens * kept + 2 * parent
    library, _, gkd = work
    assert library.store_bytes_per_token == (shards + 1) * d * 2
    assert library.store_bytes == library.store_bytes_per_token * tokens * (shards + 2) and library.gpus == shards
    worker, n, W = needed["gkd", "worker"].parts, sizes.total, hardware.num_gpus
    assert worker["child"] == -(-4 * n // W) and worker["parent"] == -(-2 * n // W) and worker["optimizer"] == -(-8 * n // W)
    assert worker["layer outputs"] == 2 * L * config.gkd.micro_batch_tokens * d * 2
    layers = 1 if config.gkd.activation_checkpointing else L
    logits = 6 * min((1 << 27) // v, config.gkd.micro_batch_tokens) * v * 4
    assert worker["activations"] == config.gkd.micro_batch_tokens * layers * (2 * 2 * outputs + 16 * d) + logits
    batch, kept_tokens = {"llama31_8b": (128, 2048), "llama33_70b": (32, 1152)}[recipe]  # what auto finds on an H100
    assert needed["evaluation", "worker"].parts["KV cache"] == batch * kept_tokens * L * 2 * 8 * kv * 2
    trials = 7 * config.gkd.tokens_until(trial_steps(config.gkd.total_steps)) if config.gkd.learning_rate == "auto" else 0
    a_token = 8 * (L * parent + v * d) + 2 * L * parent * config.gkd.activation_checkpointing
    assert gkd.flops == a_token * (config.gkd.tokens + trials)
    through = 4 * (len(gqa) + 1) * (3 * d * f + d)  # the parent's FFN behind every attention that is trained, both ways
    once = 2 * parent + 2 * (parent - 3 * d * f - d)  # the parent, and in the trainers its attention
    assert library.flops == pytest.approx(L * (once + 6 * sum(variants) + through) * config.library.tokens, rel=2e-3)


def test_what_does_not_fit_names_what_would_mend_it():
    _, needed, _, hardware, _ = planned("llama33_70b", "1x8 H100-80GB")
    words = problems(list(needed.values()), hardware)
    assert any(line.startswith("library: a shard, trainers needs") and "raise cluster.num_shards" in line for line in words)
    assert any(line.startswith("gkd: a worker needs") and "raise gkd.num_workers" in line for line in words)
    _, needed, _, hardware, _ = planned("llama33_70b", "8x8 H100-80GB", "profile.num_gpus=1")
    (line,) = problems(list(needed.values()), hardware)
    assert not problems(list(planned("llama33_70b", "8x8 H100-80GB", "profile.num_gpus=2")[1].values()), hardware)
    assert line.startswith("evaluation: a worker needs 143.6 GiB") and "raise profile.num_gpus" in line


def test_a_larger_card_takes_larger_micro_batches():
    small, large = (planned("llama33_70b", cluster)[0].config for cluster in ("8x8 H100-80GB", "8x8 H200"))
    assert small.library.micro_batch_tokens < large.library.micro_batch_tokens
    assert small.gkd.step_tokens == large.gkd.step_tokens


def test_the_verb_plans_a_gated_parent_without_a_hub(monkeypatch):
    from jobs.app import application
    from puzzle_ray.planning import settled

    monkeypatch.setattr(settled, "locate", lambda *named: pytest.fail("the hub was asked"))
    done = CliRunner().invoke(application(), ["plan", "--recipe", "llama31_8b,paper", "--cluster", "1x8 H100-80GB"])
    assert done.exit_code == 0, done.output
    assert "hardware: gkd.num_workers = 8" in done.output and "every process fits" in done.output
