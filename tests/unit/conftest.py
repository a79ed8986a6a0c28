"""Small models every unit test can afford."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from small_models import save_parent

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def no_ray():
    """The cluster that the Ray tests had in this process, if they were here, is ended."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        sys.modules["ray"].shutdown()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


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

    from puzzle_ray.data.order import Tokens

    rng = np.random.default_rng(0)
    return Tokens(rng.integers(0, 96, (64, 16), dtype=np.int32))
