"""One local Ray cluster for all tests of this folder."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def local_ray():
    """Loopback only, ended with the session; never joins a cluster that happens to run here."""
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=4,
        object_store_memory=256 << 20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray
    ray.shutdown()
