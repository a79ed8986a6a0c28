"""Asks every node of a cluster, once and before work, whether it can work on a run: one task a node."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.placement import Node as RayNode
from actors.placement import all_nodes
from puzzle_ray.errors import ClusterError
from puzzle_ray.preflight import DRIVER, Answer, Node, Question, compare, look, named
from puzzle_ray.store import Store, scratch

PACKAGES = ("puzzle_ray", "actors", "jobs")


def check_nodes(store: Store, parent: str | None, wants_gpus: bool, timeout_s: float) -> None:
    """Raises ClusterError where nodes do not share the store, run something else than the driver, lack the parent's folder or GPUs, or
    do not answer in time. What is only slow or slightly different is said on stderr.

    `parent` is a folder, or None for one that every node fetches itself. What is asked are the nodes that are alive now: those that an
    autoscaler adds later are not checked.
    """
    hidden = scratch.scratch_beside(Path("preflight")) if store.is_local else f".preflight-{uuid.uuid4().hex}"
    nonce = uuid.uuid4().hex
    question = Question(store.root, f"{store.root}/{hidden}", nonce, PACKAGES, parent, wants_gpus)
    nodes = {node["NodeID"]: node for node in all_nodes()}
    try:
        store.filesystem.makedirs(question.folder, exist_ok=True)
        store.filesystem.pipe_file(f"{question.folder}/{DRIVER}", nonce.encode())
        answers = _ask(question, nodes, timeout_s)
        seen = {node_id: _is_seen(store, question, node_id) for node_id in answers}
        driver = look(replace(question, count_gpus=False), f"{DRIVER}-2")
        warnings = compare(driver, [_node(nodes[i], answer, seen[i]) for i, answer in answers.items()], question)
    finally:
        with suppress(OSError):  # what goes wrong here must not hide what was found
            store.filesystem.rm(question.folder, recursive=True)
    for line in warnings:
        print(f"  {line}", file=sys.stderr, flush=True)


def _ask(question: Question, nodes: Mapping[str, RayNode], timeout_s: float) -> dict[str, Answer]:
    """Every node's answer. A node that is gone by now has none."""
    ask = ray.remote(num_cpus=0, max_retries=0)(look)
    tasks = {}
    for node_id, node in nodes.items():
        there = ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))
        count_gpus = question.count_gpus and bool(node["Resources"].get("GPU"))
        tasks[node_id] = there.remote(replace(question, count_gpus=count_gpus), node_id)
    deadline = time.monotonic() + timeout_s
    answers: dict[str, Answer] = {}
    silent: list[str] = []
    failed: dict[str, str] = {}
    for node_id, task in tasks.items():
        try:
            answers[node_id] = ray.get(task, timeout=max(0.0, deadline - time.monotonic()))
        except GetTimeoutError:
            ray.cancel(task, force=True)
            silent.append(node_id)
        except RayError as error:
            cause = getattr(error, "cause", None) or error
            failed[node_id] = f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[-1]}"
    alive = {node["NodeID"] for node in all_nodes()}
    if lost := [_name(nodes[node_id]) for node_id in silent if node_id in alive]:
        remedy = "take them out of the cluster, or raise cluster.placement_timeout_s"
        raise ClusterError("cluster", f"did not answer within {timeout_s:g} s: {named(lost)}", remedy)
    if lost := [node_id for node_id in failed if node_id in alive]:
        problem = f"puzzle_ray cannot run on {named(_name(nodes[node_id]) for node_id in lost)} ({failed[lost[0]]})"
        raise ClusterError("cluster", problem, "install there what the driver has, or use `ray job submit --working-dir`")
    return answers


def _is_seen(store: Store, question: Question, node_id: str) -> bool:
    try:
        return bytes(store.filesystem.cat_file(f"{question.folder}/{node_id}")) == question.nonce.encode()
    except FileNotFoundError:
        return False


def _node(node: RayNode, answer: Answer, seen: bool) -> Node:
    resources: Mapping[str, Any] = node["Resources"]
    return Node(_name(node), answer, seen, resources.get("GPU", 0.0), int(resources.get("object_store_memory", 0)))


def _name(node: RayNode) -> str:
    """Several nodes may have one address, as in tests."""
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"
