"""On a GPU the library is that of a CPU, up to rounding; on Ray it is that of one process."""

import numpy as np
import pytest
import ray
import torch
from small_models import save_parent

from actors import library_stream
from actors.transport import HostCopies
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.data.order import Tokens
from puzzle_ray.distill.library import build_serially
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.models.blocks import load_stack
from puzzle_ray.models.child import read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.serial import score_serially
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CONFIG = LibraryConfig(tokens=960, calibration_tokens=64, validation_tokens=64, micro_batch_tokens=32, checkpoint_every=4)
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = save_parent(tmp_path_factory.mktemp("parent"), num_hidden_layers=4)
    space = search_space(read_config(folder), ("gqa:1", "window:8", "linear", "noop"), ("ffn:24", "linear", "noop"), 8)
    tokens = Tokens(np.random.default_rng(0).integers(0, 96, (64, 16), dtype=np.int32))
    store = Store(str(tmp_path_factory.mktemp("store")))
    on_gpu = build_serially(
        str(folder), space, CONFIG, tokens, 0, store.artifact("library", {"on": "gpu"}, {}), Quiet(), device=GPU
    )
    return str(folder), space, tokens, store, on_gpu


def losses(library):
    return np.array([[row.start_loss, row.final_loss] for row in library.rows()])


def test_a_library_is_that_of_a_cpu(setting):
    folder, space, tokens, store, on_gpu = setting
    on_cpu = build_serially(folder, space, CONFIG, tokens, 0, store.artifact("library", {"on": "cpu"}, {}), Quiet())
    np.testing.assert_allclose(losses(on_gpu), losses(on_cpu), rtol=2e-2, atol=1e-4)


def test_scores_are_those_of_a_cpu(setting):
    folder, space, tokens, store, library = setting
    config = read_config(folder)
    scoring = ScoringConfig(tokens=128, micro_batch_tokens=64)
    texts = tokens.first(128, 4)
    found = []
    for device in (torch.device("cpu"), GPU):
        stack = load_stack(folder, describe(config), config, 0, 4, torch.float32, device=device)
        step = store.artifact("scores", {"on": device.type}, {})
        found.append(score_serially(stack, texts, space, scoring, step, library.states, Quiet()))
    cpu, gpu = ([row.value for row in scores.rows if row.metric == "kl"] for scores in found)
    np.testing.assert_allclose(gpu, cpu, rtol=1e-2, atol=1e-4)


def test_copies_to_the_host_are_whole_and_their_memory_is_used_again():
    copies, places = HostCopies(), []
    for number in range(2):
        with torch.inference_mode(number == 0):
            tensors = [torch.randn(64, 256, 128, device=GPU) @ torch.randn(128, 128, device=GPU) for _ in range(3)]
            found = [copies.start(tensor) for tensor in tensors]
            copies.wait()
        assert all(host.is_pinned() and torch.equal(host, tensor.cpu()) for host, tensor in zip(found, tensors, strict=True))
        places.append([host.data_ptr() for host in found])
    assert places[0] == places[1] and len(set(places[0])) == 3


def test_shards_and_trainers_share_a_gpu(setting):
    folder, space, tokens, store, serial = setting
    ray.init(address="local", include_dashboard=False, num_cpus=4, object_store_memory=256 << 20, log_to_driver=False)
    try:
        cluster = ClusterConfig(num_shards=2, blocks_per_trainer=2, gpus_per_shard=0.1, gpus_per_trainer=0.1)
        step = store.artifact("library", {"on": "ray"}, {})
        library = library_stream.build_library(folder, space, CONFIG, cluster, tokens, 0, step, Quiet())
    finally:
        ray.shutdown()
    np.testing.assert_allclose(losses(library), losses(serial), rtol=1e-3, atol=1e-5)
