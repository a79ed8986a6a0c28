"""Small models every unit test can afford."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tiny_config(model_type: str = "llama", **changes):
    from transformers import AutoConfig

    settings = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    }
    return AutoConfig.for_model(model_type, **(settings | changes))


def save_parent(folder: Path, model_type: str = "llama", seed: int = 0, **changes) -> Path:
    """A random model of the family, its weights large enough that blocks matter."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def parent_folder(tmp_path_factory) -> Path:
    return save_parent(tmp_path_factory.mktemp("parent"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"no test data at {SHARED.name}")
    return SHARED


@pytest.fixture
def random_tokens():
    import numpy as np

    from puzzle_ray.data import Tokens

    rng = np.random.default_rng(0)
    return Tokens(rng.integers(0, 96, (64, 16), dtype=np.int32))
