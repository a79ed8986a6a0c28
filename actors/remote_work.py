"""Single pieces of heavy work on a worker: weights go from file to file, never through the driver."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from actors.parent_shard import environment
from actors.placement import DIED, end, matching_nodes, require, wait_ready
from actors.transport import Container
from puzzle_ray.artifacts import Architecture, LayerChoice, Scenario
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.errors import ClusterError
from puzzle_ray.evaluation.settings import EvaluateConfig
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.downstream import QuestionBatch
from puzzle_ray.store import Artifact


def realize(num_threads: int, parent: str, choices: Sequence[LayerChoice], library: Artifact, artifact: Artifact) -> None:
    """Assembles and publishes a child."""
    from puzzle_ray.distill import realize as whole
    from puzzle_ray.process import compute_with

    compute_with(num_threads)
    whole.realize(parent, choices, library, artifact)


def evaluate(
    num_threads: int,
    folders: Mapping[str, str],
    batches: Sequence[Container],
    architecture: Architecture | None,
    scenario: Scenario,
    config: EvaluateConfig,
    dtype: str,
    use_gpu: bool,
    questions: Sequence[QuestionBatch] = (),
) -> dict[str, Any]:
    """Measures the parent and its children side by side."""
    import torch

    from puzzle_ray.evaluation import evaluate as library
    from puzzle_ray.process import compute_with

    compute_with(num_threads)
    tensors = [torch.from_numpy(batch.copy()) for batch in batches]
    return library.evaluate(folders, tensors, architecture, scenario, config, dtype, Quiet(), use_gpu, questions)


def predict(num_threads: int, folders: Mapping[str, str], batches: Sequence[Container]) -> dict[str, dict[str, float]]:
    """Held-out predictions of the parent and its children, nothing timed."""
    import torch

    from puzzle_ray.evaluation.evaluate import predictions
    from puzzle_ray.models.child import load_model
    from puzzle_ray.process import compute_with

    compute_with(num_threads)
    models = {name: load_model(folder, torch.float32) for name, folder in folders.items()}
    return predictions(models, [torch.from_numpy(batch.copy()) for batch in batches])


def node_cpus(resources: Mapping[str, float] | None = None, label_selector: Mapping[str, str] | None = None) -> int:
    """CPUs of the biggest live node that has these resources and labels; 1 where there is none."""
    found = matching_nodes(resources or {}, label_selector)
    return max(1, int(max((node["Resources"].get("CPU", 0) for node in found), default=1)))


@ray.remote(max_restarts=2, max_task_retries=2)  # the work is done again from the start, into the same step
class LoneWorker:
    """Has a node's cores to itself."""

    def pid(self) -> int:
        return os.getpid()

    def call(self, function: Callable[..., Any], num_threads: int, args: Sequence[Any]) -> Any:
        return function(num_threads, *args)


def run_alone(
    function: Callable[..., Any],
    *args: Any,
    cluster: ClusterConfig,
    what: str,
    profile: ProfileConfig | None = None,
    timeout_s: float = 24 * 3600.0,
) -> Any:
    """Runs `function(num_threads, *args)` with all cores of one node, so that nothing else of ours disturbs it there.

    With `profile`, on the kind of node that profiles. Raises ClusterError when no node takes it within
    `cluster.placement_timeout_s`, when its process keeps dying, or when it does not end within `timeout_s`.
    """
    resources, labels = (dict(profile.resources), dict(profile.label_selector)) if profile else ({}, {})
    threads = node_cpus(resources, labels)
    options: dict[str, Any] = {
        "num_cpus": threads,
        "num_gpus": profile.num_gpus if profile else 0,
        "runtime_env": environment(threads),
    }
    options |= {name: value for name, value in (("resources", resources), ("label_selector", labels)) if value}
    require(options, f"the worker for {what}", what, cluster.autoscaling)
    worker = LoneWorker.options(**options).remote()  # type: ignore[attr-defined]
    try:
        wait_ready([worker], f"worker for {what}, with {threads} CPUs,", cluster.placement_timeout_s)
        work = worker.call.remote(function, threads, args)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if ray.wait([work], timeout=1.0)[0]:
                return ray.get(work, timeout=60)
    except DIED as error:
        reason = str(error).strip().splitlines()[0]
        raise ClusterError(
            what, f"its process died again and again ({reason})", "if it lacked memory, use a bigger node"
        ) from None
    finally:
        end([worker])
    raise ClusterError(what, f"not done within {timeout_s:g} s", "check the cluster with `ray status`")
