"""One way to the logits: scoring, the pick's meter, GKD and evaluation see what the whole model says, whatever its family does to it."""

import pytest
import torch
from small_models import save_parent
from torch import nn
from torch.nn import functional as F

from puzzle_ray.artifacts import KINDS, PARENT, LayerChoice, SearchSpace
from puzzle_ray.distill.losses import next_token_loss_per_sequence
from puzzle_ray.evaluation.child_meter import ChildMeter
from puzzle_ray.evaluation.evaluate import predictions
from puzzle_ray.families.registry import families
from puzzle_ray.models.blocks import load_stack, subblock_state
from puzzle_ray.models.child import assemble, load_model, new_child, read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.scoring import fisher
from puzzle_ray.scoring.metrics import compare_predictions, mean
from puzzle_ray.scoring.replacements import Damage, Replacement, ScoringTask, all_replacements
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.scoring.shard import ShardScorer
from puzzle_ray.variants.space import search_space

TEXTS = [torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(n)) for n in range(2)]
LOUD = {  # settings so far from 1 that leaving one out changes every number
    "granite": {"logits_scaling": 16.0, "embedding_multiplier": 5.0},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {"final_logit_softcapping": 3.0},
}
CHOICES = (LayerChoice(ffn="noop"), LayerChoice("linear", "ffn:24"), LayerChoice("noop"))


class States:
    """Random weights for replaced subblocks, in a library's place."""

    def __init__(self, config, descriptor):
        self.config, self.descriptor = config, descriptor

    def states(self, index, choice):
        torch.manual_seed(index)
        child = new_child(self.config, [choice] * 3, torch.float32)
        layer = child.get_submodule(self.descriptor.layers)[index]
        return {k: subblock_state(layer, k, self.descriptor) for k in KINDS if choice.variant(k) != PARENT}


@pytest.fixture(scope="module", params=sorted(families()))
def parent(request, tmp_path_factory):
    """(folder, config, stack, the model as transformers loads it)"""
    from transformers import AutoModelForCausalLM

    folder = save_parent(tmp_path_factory.mktemp(request.param), request.param, **LOUD.get(request.param, {}))
    config = read_config(folder)
    descriptor = describe(config)
    stack = load_stack(folder, descriptor, config, 0, 3, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=descriptor.attn_implementation)
    return folder, config, stack, model.eval()


def child_of(parent, choices):
    folder, config, stack, _ = parent
    library = States(config, stack.descriptor)
    trained = {(i, kind): state for i, choice in enumerate(choices) for kind, state in library.states(i, choice).items()}
    return assemble(folder, config, choices, trained, torch.float32)


@torch.no_grad()
def test_everybody_sees_the_parents_own_logits(parent):
    folder, config, stack, model = parent
    scorer = ShardScorer(stack, TEXTS)
    scorer.run_parent(TEXTS)
    meter = ChildMeter(stack, States(config, stack.descriptor), TEXTS)
    meter.remember_parent()
    loaded = load_model(folder, torch.float32)  # GKD's teacher, and evaluation's parent
    losses = []
    for number, ids in enumerate(TEXTS):
        logits, final = model(ids).logits, model.base_model(ids).last_hidden_state
        log_probs = F.log_softmax(logits, -1)
        losses += compare_predictions(log_probs, log_probs, ids).lm_loss
        hidden = scorer.inputs[number][3]
        assert torch.equal(stack.logits(hidden), logits) and torch.equal(stack.predict(hidden)[0], final)
        assert torch.equal(scorer.parent[number].log_probs, log_probs) and torch.equal(scorer.parent[number].hidden, final)
        assert torch.equal(stack.output_head.log_probs(meter.parent_final[number]), log_probs)
        assert torch.equal(loaded(ids, use_cache=False).logits, logits)
    assert predictions({"parent": loaded}, TEXTS)["parent"]["heldout_loss"] == mean(losses) == meter.parent_loss
    for name in ("divisor", "softcap"):
        if getattr(stack, name) is not None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(stack, name, None)
                assert not torch.allclose(stack.logits(hidden), logits, rtol=0.1)


@torch.no_grad()
def test_replace_one_scores_are_the_whole_models(parent):
    _, config, stack, model = parent
    scorer, library = ShardScorer(stack, TEXTS), States(config, stack.descriptor)
    scorer.run_parent(TEXTS)
    for layer, choice in enumerate(CHOICES):
        task = ScoringTask((Replacement(layer, choice),), (0, 1))
        (found,) = scorer.measure(task, scorer.run_replacements(task, library.states))
        child = child_of(parent, [choice if index == layer else LayerChoice() for index in range(3)])
        expected = []
        for ids in TEXTS:
            log_probs = F.log_softmax(model(ids).logits, -1)
            finals = (m.base_model(ids).last_hidden_state for m in (model, child))
            loss = next_token_loss_per_sequence(log_probs, ids).tolist()
            expected.append(Damage.of(compare_predictions(log_probs, child(ids).logits, ids, *finals), loss))
        assert Damage.joined(found) == Damage.joined(expected)


def test_the_meter_and_the_evaluation_agree_about_a_child(parent):
    folder, config, stack, _ = parent
    models = {"parent": load_model(folder, torch.float32), "child": child_of(parent, CHOICES)}
    found = ChildMeter(stack, States(config, stack.descriptor), TEXTS).measure(CHOICES)
    expected = predictions(models, TEXTS)["child"]
    assert found.kl == expected["kl"]


@pytest.mark.parametrize("family", ["llama", *LOUD])
def test_fisher_is_the_second_derivative_of_the_kl(family, tmp_path):
    """The labels' gradients, weighted by the labels' true probabilities, against finite differences in float64."""
    folder = save_parent(tmp_path, family, **LOUD.get(family, {}))
    config = read_config(folder)
    stack = load_stack(folder, describe(config), config, 0, 3, torch.float64)
    stack.final_norm = nn.LayerNorm(32, dtype=torch.float64)  # the families' own compute in float32
    generator = torch.Generator().manual_seed(0)
    leaving, step = (torch.randn(1, 5, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        log_probs = F.log_softmax(stack.logits(leaving), -1)[0]
    probs = log_probs.exp()
    labels = torch.arange(96).expand(5, 96)
    gradients = torch.cat(fisher.gradients_of_labels(stack, leaving, probs, labels))  # [label, position, hidden_size]
    assert torch.einsum("lpd,pl->pd", gradients, probs).abs().max() < 1e-6  # scores have mean zero
    fisher_product = ((gradients * step).sum(-1).T.square() * probs).sum(-1)

    def kl(size):
        with torch.no_grad():
            return (probs * (log_probs - F.log_softmax(stack.logits(leaving + size * step), -1)[0])).sum(-1)

    numerical = (kl(1e-4) + kl(-1e-4)) / 1e-4**2
    assert fisher_product.tolist() == pytest.approx(numerical.tolist(), rel=1e-4) and numerical.min() > 0


@pytest.mark.parametrize("family", ["llama", *LOUD])
def test_estimates_near_the_exact_kl_of_small_changes(family, tmp_path):
    folder = save_parent(tmp_path, family, **LOUD.get(family, {}))
    config = read_config(folder)
    descriptor = describe(config)
    stack = load_stack(folder, descriptor, config, 0, 3, torch.float32)
    size = 0.1 if family == "granite" else 0.01  # a divisor of 16 makes the KL 256 times smaller
    layers = search_space(config, ("gqa:1",), ("ffn:24",), 8).layers
    space = SearchSpace(tuple(type(x)((PARENT, "gqa:2"), (PARENT, "ffn:48"), x.layer_type) for x in layers))

    def nearly(layer, choice):
        generator = torch.Generator().manual_seed(layer)
        return {
            kind: {
                name: value * (1 + size * torch.randn(value.shape, generator=generator))
                for name, value in subblock_state(stack.layer(layer), kind, descriptor).items()
            }
            for kind in KINDS
            if choice.variant(kind) != PARENT
        }

    scorer = ShardScorer(stack, TEXTS)
    scorer.run_parent(TEXTS)
    settings = ScoringConfig(granularity="subblock", fisher_samples=200)
    found, _ = fisher.shard_estimates(scorer, (0, 1), None, space, settings, nearly)
    for item in all_replacements(space, "subblock"):
        task = ScoringTask((item,), (0, 1))
        (damage,) = scorer.measure(task, scorer.run_replacements(task, nearly))
        assert mean(found[fisher.estimate_key(item)]) == pytest.approx(mean(Damage.joined(damage).values["kl"]), rel=0.4)
