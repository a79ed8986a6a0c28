"""What a child minimises: presets, temperature, weights of layers, chosen tokens, and sequences of growing length."""

import math

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from gkd_trainers import CONFIG, LENGTH, new_parent, new_trainer, random_child, random_tokens
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.config import load
from puzzle_ray.data.order import Tokens
from puzzle_ray.distill.child_loss import ChildLoss, layer_outputs
from puzzle_ray.distill.chosen_tokens import answer_markers, in_answers
from puzzle_ray.distill.curriculum import Curriculum, gkd_steps, of_length
from puzzle_ray.distill.gkd import train_to_end
from puzzle_ray.distill.head_losses import head_losses, layers_cosine_distances
from puzzle_ray.distill.layer_weights import layer_weights
from puzzle_ray.distill.losses import NO_LABEL, cosine_distance, next_labels
from puzzle_ray.distill.settings import GkdConfig, LmTokens
from puzzle_ray.errors import ConfigError
from puzzle_ray.models.child import child_config, new_child
from puzzle_ray.models.head import Head
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store

CURRICULUM = [
    {"sequence_length": 8, "tokens": 100, "micro_batch_tokens": 32},
    {"sequence_length": LENGTH, "tokens": 128, "micro_batch_tokens": 64},
    {"sequence_length": 4 * LENGTH, "tokens": 64, "micro_batch_tokens": 64},
]


def settings(**changes):
    return GkdConfig.model_validate(CONFIG.model_dump(exclude_unset=True) | changes)


@pytest.mark.parametrize(
    ("preset", "weights"),
    {"lm": (0, 0, 1), "kld": (1, 0, 0), "cosine": (0, 1, 0), "lm+kld": (1, 0, 1), "lm+cosine": (0, 1, 1),
     "kld+cosine": (1, 1, 0), "lm+kld+cosine": (1, 1, 1), "paper": (1, 1, 0)}.items(),
)  # fmt: skip
def test_a_preset_stands_for_weights_and_nothing_else(preset, weights):
    config = settings(preset=preset)
    assert (config.kl_weight, config.cosine_weight, config.lm_weight) == weights
    assert config.cosine_reduction == ("sum" if preset == "paper" else "mean")
    names = dict(zip(("kl_weight", "cosine_weight", "lm_weight"), weights, strict=True))
    assert config.identity() == settings(cosine_reduction=config.cosine_reduction, **names).identity()


def test_what_is_set_beside_a_preset_goes_on_top_of_it():
    config = settings(preset="paper", cosine_weight=0.5, cosine_reduction="mean")
    assert (config.kl_weight, config.cosine_weight, config.cosine_reduction) == (1, 0.5, "mean")
    assert load("tiny", None, ("gkd.preset=lm+kld",)).gkd.lm_weight == 1


def test_a_learning_rate_may_be_written_as_yaml_does_not_read_numbers():
    assert load("tiny", None, ("gkd.learning_rate=1e-4",)).gkd.learning_rate == 1e-4
    assert load("tiny", None, ("gkd.learning_rate=auto",)).gkd.learning_rate == "auto"


def test_preset_none_trains_nothing():
    assert not settings(preset="none").trains and gkd_steps(settings(preset="none")) == 0
    assert new_trainer(settings(preset="none")).total_steps == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preset": "kdl"}, "kld"),
        ({"lm_weight": 1, "lm_tokens": {"after": "<a>"}}, "set both gkd.lm_tokens.after and gkd.lm_tokens.until"),
        ({"lm_weight": 1, "lm_tokens": {}}, "nothing is chosen"),
        ({"lm_tokens": {"min_parent_probability": 0.5}}, "set gkd.lm_weight"),
        ({"cosine_layers": [0.0, 0.0]}, "gkd.cosine_weight=0"),
        ({"learning_rate": "auto", "heldout_tokens": 0}, "set gkd.heldout_tokens"),
        ({"learning_rate": "best"}, "write a number above 0, or auto"),
        ({"learning_rate": 0}, "write a number above 0, or auto"),
        ({"cosine_layers": "none"}, "write all, kept, or a list"),
        ({"cosine_layers": [1, -1]}, "each at least 0"),
        ({"stages": [{"sequence_length": 7, "tokens": 9, "micro_batch_tokens": 16}]}, "no multiple of sequence_length=7"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        settings(**changes)


def test_lengths_that_do_not_fit_the_text_are_refused_before_any_work():
    stage = "gkd.stages=[{sequence_length: 300, tokens: 600, micro_batch_tokens: 600}]"
    with pytest.raises(ConfigError, match="neither a multiple nor a part of data.sequence_length=256"):
        load("tiny", None, (stage,))


def distances(child, parent, ids):
    with torch.no_grad(), layer_outputs(child) as own, layer_outputs(parent) as theirs:
        child(ids), parent(ids)
    return layers_cosine_distances(own, theirs)


def test_the_cosine_loss_adds_up_or_averages_over_layers_and_weighs_them():
    parent = new_parent().eval()
    child, ids = random_child(parent).eval(), random_tokens().batch(0, 0, 4)
    each = distances(child, parent, ids)

    def cosine(**changes):
        return ChildLoss(settings(**changes), child.config).terms(child, parent, ids)[2]

    torch.testing.assert_close(cosine(), each.mean())
    torch.testing.assert_close(cosine(cosine_reduction="sum"), each.sum())
    weights = torch.tensor([0.5, 0.0, 2.0])
    torch.testing.assert_close(cosine(cosine_layers=[0.5, 0, 2]), (weights * each).sum() / 2.5)
    torch.testing.assert_close(cosine(cosine_layers=[0.5, 0, 2], cosine_reduction="sum"), (weights * each).sum())
    own = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    torch.testing.assert_close(layers_cosine_distances(own[:2], own[2:]).mean(), cosine_distance(own[:2], own[2:]))


def test_layers_that_were_removed_whole_may_be_left_out():
    parent = new_parent()
    removed = [LayerChoice(), LayerChoice("noop", "noop"), LayerChoice("noop", "linear")]
    child = new_child(parent.config, removed, torch.float32)
    assert layer_weights(settings(cosine_layers="kept"), child.config) == (1, 0, 1)
    assert layer_weights(settings(), child.config) == (1, 1, 1)
    assert layer_weights(settings(cosine_layers="kept"), parent.config) == (1, 1, 1)
    with pytest.raises(ConfigError, match="2 weights for 3 layers"):
        ChildLoss(settings(cosine_layers=[1, 1]), child.config)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_at_a_temperature_the_loss_and_its_gradient_are_those_of_the_formula(temperature):
    generator = torch.Generator().manual_seed(0)
    child = (3 * torch.randn(2, 5, 11, generator=generator)).requires_grad_()
    parent, ids = 3 * torch.randn(2, 5, 11, generator=generator), torch.randint(0, 11, (2, 5), generator=generator)
    soft = [(x / temperature).log_softmax(-1).flatten(0, 1) for x in (child, parent)]
    kl = functional.kl_div(*soft, log_target=True, reduction="batchmean") * temperature**2
    lm = functional.cross_entropy(child[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    (expected,) = torch.autograd.grad(0.7 * kl + 0.3 * lm, child)
    head = Head(nn.Linear(11, 11, bias=False).requires_grad_(False))
    head.linear.weight.copy_(torch.eye(11))  # so that what it is given are the logits
    total, own_kl, own_lm = head_losses(head, child, head, parent, next_labels(ids), 0.7, 0.3, temperature)
    (gradient,) = torch.autograd.grad(total, child)
    torch.testing.assert_close(torch.stack([own_kl, own_lm]), torch.stack([kl, lm]))
    torch.testing.assert_close(gradient, expected)


def by_hand(row, after, until):
    """One token after the other, as one would read it."""
    inside, out = False, []
    for position in range(len(row)):
        out.append(inside)
        seen = row[: position + 1]
        if seen[-len(after) :] == after:
            inside = True
        elif inside and seen[-len(until) :] == until:
            inside = False
    return out


@pytest.mark.parametrize(("after", "until"), [([1], [2]), ([1, 2], [3]), ([1], [2, 0])])
def test_answers_are_found_between_their_markers(after, until):
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (20, 30)))
    found = in_answers(ids, after, until)
    assert 0.1 < float(found.float().mean()) < 0.8
    assert found.tolist() == [by_hand(row, after, until) for row in ids.tolist()]


def test_the_next_token_loss_may_count_answers_alone():
    """A byte a token: the loss is that of the bytes of the answer and of its end."""
    tokenizer = byte_tokenizer()
    rule = LmTokens(after="<a>", until="</a>")
    markers = answer_markers(rule, tokenizer)
    text = "one?<a>yes</a> two?<a>n"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    config = settings(preset="lm", lm_tokens=rule)
    parent = new_parent()
    labels = ChildLoss(config, parent.config, markers)._labels(ids, Head.of(parent), torch.zeros(1, ids.shape[1], 1))
    assert tokenizer.decode(labels[labels != NO_LABEL]) == "yes</a>n"
    with pytest.raises(ConfigError, match=r"gkd.lm_tokens.until: ' *' has no tokens"):
        answer_markers(LmTokens(after="a", until=" "), lambda text, **_: {"input_ids": [5] * len(text.strip())})


def test_the_next_token_loss_may_count_what_the_parent_is_sure_of():
    parent = new_parent().eval()
    child, ids = random_child(parent).eval(), random_tokens().batch(0, 0, 4)
    with torch.no_grad():
        own, theirs = (model(ids).logits[:, :-1].log_softmax(-1).flatten(0, 1) for model in (child, parent))
    label = ids[:, 1:].reshape(-1, 1)
    sure = theirs.gather(1, label).squeeze(1).exp()
    least = float(sure.median())
    config = settings(preset="lm", lm_tokens={"min_parent_probability": least})
    lm = ChildLoss(config, child.config).terms(child, parent, ids)[3]
    chosen = sure.log() >= math.log(least)
    assert 0 < int(chosen.sum()) < len(chosen)
    torch.testing.assert_close(lm, -own.gather(1, label).squeeze(1)[chosen].mean())


def test_a_curriculum_reads_the_same_text_in_sequences_of_growing_length():
    tokens = random_tokens()
    text = Curriculum.of(tokens, settings(stages=CURRICULUM, num_workers=2), 3)
    assert list(text.steps) == [2, 1, 1] and text.total_steps == gkd_steps(settings(stages=CURRICULUM, num_workers=2)) == 4
    assert [tuple(text.batch(step, 1).shape) for step in range(4)] == [(4, 8), (4, 8), (4, 16), (1, 64)]
    assert text.tokens == 2 * (2 * 32 + 64 + 64)
    whole = tokens.sequences.reshape(-1)
    rows = {tuple(row) for row in whole[: 10 * 64].reshape(10, 64).tolist()}
    assert tuple(text.batch(3, 0)[0].tolist()) in rows, "consecutive sequences are joined"
    read = [tuple(text.batch(step, rank)[0].tolist()) for step in range(4) for rank in range(2)]
    assert len(set(read)) == len(read)


def test_without_stages_the_text_is_read_as_ever():
    tokens = random_tokens()
    text = Curriculum.of(tokens, settings(num_workers=2), 3)
    assert all(torch.equal(text.batch(s, r), tokens.batch(3, 2 * s + r, 4)) for s in range(3) for r in range(2))
    assert text.total_steps == 3 and of_length(tokens, LENGTH) is tokens


def test_a_length_that_the_text_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="no sequence of 6400 tokens: there are 640"):
        of_length(random_tokens(), 6400)
    with pytest.raises(ConfigError, match="neither a multiple nor a part"):
        of_length(Tokens(random_tokens().sequences), 24)


def test_a_resumed_curriculum_ends_in_the_same_bits(tmp_path):
    config = settings(stages=CURRICULUM, checkpoint_every=1, preset="lm+kld+cosine", temperature=2.0)
    whole, first, second = (new_trainer(config) for _ in range(3))
    for _ in range(whole.total_steps):
        whole.step()
    assert whole.total_steps == 7
    for _ in range(5):
        first.step()
    artifact = Store(str(tmp_path)).artifact("gkd", {}, {})
    artifact.write_tensors("checkpoint.safetensors", first.state_tensors())
    train_to_end(second, artifact, Quiet())
    assert second.curve == whole.curve
    assert all(torch.equal(p, second.parameters[name]) for name, p in whole.parameters.items())


def test_a_child_keeps_its_parents_rope_scaling():
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 16}  # fmt: skip
    base = new_parent().config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(**{name: base[name] for name in names}, max_position_embeddings=128, rope_parameters=scaled)
    choices = [LayerChoice("gqa:1", "ffn:24")] * 3
    assert child_config(config, choices).rope_parameters == config.rope_parameters
    child = new_child(config, choices, torch.float32)
    assert child.config.max_position_embeddings == 128
    assert torch.equal(child.model.rotary_emb.inv_freq, type(child.model.rotary_emb)(config=config).inv_freq)
