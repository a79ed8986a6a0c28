"""Single pieces of heavy work on a worker: weights go from file to file, never through the driver."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from actors.parent_shard import environment
from puzzle_ray.artifacts import Architecture, LayerChoice, Scenario
from puzzle_ray.config import ClusterConfig, EvaluateConfig
from puzzle_ray.errors import ClusterError
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Step
from puzzle_ray.transport import Container


def realize(num_threads: int, parent: str, choices: Sequence[LayerChoice], library: Step, step: Step) -> None:
    """Assembles and publishes a child."""
    import torch

    from puzzle_ray.export import hf

    torch.set_num_threads(num_threads)
    hf.realize(parent, choices, library, step)


def evaluate(
    num_threads: int,
    folders: Mapping[str, str],
    batches: Sequence[Container],
    architecture: Architecture | None,
    scenario: Scenario,
    config: EvaluateConfig,
    dtype: str,
) -> dict[str, Any]:
    """Measures the parent and its children side by side."""
    import torch

    from puzzle_ray import evaluate as library

    torch.set_num_threads(num_threads)
    tensors = [torch.from_numpy(batch.copy()) for batch in batches]
    return library.evaluate(folders, tensors, architecture, scenario, config, dtype, Quiet())


def largest_node_cpus() -> int:
    """CPUs of the biggest live node."""
    return max(1, int(max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=1)))


def run_alone(
    function: Callable[..., Any],
    *args: Any,
    cluster: ClusterConfig,
    what: str,
    timeout_s: float = 24 * 3600.0,
    num_gpus: float = 0,
    resources: Mapping[str, float] | None = None,
    label_selector: Mapping[str, str] | None = None,
) -> Any:
    """Runs `function(num_threads, *args)` on one node with all its cores, so that nothing else of ours disturbs it there.

    Raises ClusterError when no node takes it within `cluster.placement_timeout_s`, or it does not end in `timeout_s`.
    """
    threads = largest_node_cpus()
    options: dict[str, Any] = {"num_cpus": threads, "num_gpus": num_gpus, "max_retries": 2, "runtime_env": environment(threads)}
    if resources:
        options["resources"] = dict(resources)
    if label_selector:
        options["label_selector"] = dict(label_selector)
    work = ray.remote(function).options(**options).remote(threads, *args)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, _ = ray.wait([work], timeout=1.0)
        if done:
            return ray.get(work, timeout=60)
    ray.cancel(work, force=True)
    with suppress(GetTimeoutError, ray.exceptions.RayError):
        ray.get(work, timeout=5)
    raise ClusterError(what, f"not done within {timeout_s:g} s", "check the cluster with `ray status`")
