"""A tiny parent, random children of it and random tokens, ready for global distillation."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.data.splits import TOKENS
from puzzle_ray.distill.gkd import CHILD, GkdJob
from puzzle_ray.models.child import new_child, save_child
from puzzle_ray.store import Store

VOCAB_SIZE, LENGTH = 64, 16
CHOICES = (LayerChoice("gqa:1", "ffn:24"), LayerChoice("linear", "noop"))


def gkd_jobs(folder, config, children=(CHOICES,)):
    """A job for each of the children, all in one store."""
    store = Store(str(folder / "store"))
    torch.manual_seed(0)
    model_config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(model_config).save_pretrained(folder / "parent")
    data = store.artifact("data", {}, {})
    sequences = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB_SIZE, (100, LENGTH)).astype(np.int32))
    data.write_tensors(TOKENS, {"train": sequences, "heldout": sequences[:4].clone()})
    heldout = (sequences[:4].long().numpy(), sequences[4:8].long().numpy())
    jobs = []
    for choices in children:
        child = new_child(model_config, list(choices), torch.float32)
        for parameter in child.parameters():
            parameter.data = 0.05 * torch.randn(parameter.shape) + (parameter.ndim == 1)
        which = {"choices": ", ".join(choice.label for choice in choices)}
        realized = store.artifact("realize", which, {})
        with realized.folder_to_publish(CHILD) as target:
            save_child(child, folder / "parent", target)
        jobs.append(GkdJob(str(folder / "parent"), realized, data, store.artifact("gkd", which, {}), config, 3, heldout=heldout))
    return jobs
