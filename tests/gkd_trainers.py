"""Small parents, random children of them and their trainers, for tests of global distillation."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.data.order import Tokens
from puzzle_ray.distill.gkd_trainer import GkdTrainer
from puzzle_ray.distill.settings import GkdConfig
from puzzle_ray.models.child import new_child

VOCAB_SIZE, LENGTH = 64, 16
CHOICES = [LayerChoice("gqa:1", "ffn:24"), LayerChoice("noop", "linear"), LayerChoice("linear", "noop")]
CONFIG = GkdConfig(tokens=6 * 64, micro_batch_tokens=64, learning_rate=1e-2, checkpoint_every=3)
LONG = CONFIG.model_copy(update={"tokens": 40 * 64, "heldout_looks": 8, "checkpoint_every": 3})


def new_parent(seed=0, tied=True):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def random_child(parent, seed=1):
    generator = torch.Generator().manual_seed(seed)
    child = new_child(parent.config, CHOICES, torch.float32)
    for parameter in child.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1)
    return child


def random_tokens():
    return Tokens(np.random.default_rng(0).integers(0, VOCAB_SIZE, (40, LENGTH)).astype(np.int32))


def new_trainer(config=CONFIG, tied=True, **kwargs):
    parent = new_parent(tied=tied)
    return GkdTrainer(random_child(parent), parent, random_tokens(), config, seed=3, **kwargs)


def heldout():
    return random_tokens().first(96, 2)


def watched(config=LONG, **kwargs):
    """A trainer that is watched on held-out text."""
    trainer = new_trainer(config, **kwargs)
    trainer.watch(heldout())
    return trainer


def weights(trainer):
    """A copy of the child's weights."""
    return {name: p.detach().clone() for name, p in trainer.parameters.items()}


def summing_over_two(rank, tensors, barrier):
    def all_reduce(tensor):
        tensors[rank] = tensor.clone()
        barrier.wait(timeout=240)
        tensor.copy_(tensors[0] + tensors[1])
        barrier.wait(timeout=240)

    return all_reduce
