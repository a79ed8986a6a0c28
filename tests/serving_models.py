"""Tiny models for the serving engine, and what `generate` says of them."""

from __future__ import annotations

import random
import threading

import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from small_models import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.models.child import new_child
from puzzle_ray.serving.sampling import SamplingParams

TOKENIZER = byte_tokenizer()
CHILD = [LayerChoice("noop", "parent"), LayerChoice("gqa:1", "ffn:24"), LayerChoice("linear", "noop")]
GREEDY = SamplingParams(max_tokens=20, temperature=0)
ENDLESS = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
WAIT_S = 60.0


def random_weights(model):
    """Large enough that the next token depends on the whole text."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model.eval()


def tiny_model(kind: str):
    common = {"vocab_size": VOCAB_SIZE, "eos_token_id": 0}
    if kind == "child":
        return random_weights(new_child(tiny_config(**common), CHILD, torch.float32))
    if kind == "gpt2":
        config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, **common)
    else:
        windows = {} if kind == "llama" else {"sliding_window": 8}
        config = tiny_config(kind, **windows, **common)
    return random_weights(AutoModelForCausalLM.from_config(config))


def longrope_model():
    """A Phi-3 whose frequencies differ for batches of more than 32 tokens."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32, **factors}
    config = tiny_config("phi3", vocab_size=VOCAB_SIZE, eos_token_id=0, original_max_position_embeddings=32, rope_parameters=rope)
    return random_weights(AutoModelForCausalLM.from_config(config))


def gated(model):
    """A semaphore that every forward pass from now on takes one permit of."""
    gate = threading.Semaphore(0)

    def wait(*_):
        if not gate.acquire(timeout=WAIT_S):
            raise TimeoutError("the gate was never opened")

    model.register_forward_pre_hook(wait)
    return gate


def generated(model, prompt, max_tokens):
    """The reference: this prompt alone."""
    ids = torch.tensor([prompt])
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, pad_token_id=0)
    return tokens[0, len(prompt) :].tolist()


def some_prompts(count, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(1, VOCAB_SIZE) for _ in range(draw.choice([1, 4, 13, 30, 31]))] for _ in range(count)]
