"""The cluster as a person who looks after a run wants to see it: nodes, what is free, which workers there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.util import list_named_actors

from actors.names import SEPARATOR, count_by_kind

SHOWN = ("CPU", "GPU", "object_store_memory")


def cluster_view() -> dict[str, Any]:
    """Nodes, resources (all and free), and workers by kind. Of this driver's own actors only: others' have namespaces of their own."""
    total, free = ray.cluster_resources(), ray.available_resources()
    names = [name for name in list_named_actors() if SEPARATOR in name]
    return {
        "nodes": sum(bool(node["Alive"]) for node in ray.nodes()),
        "resources": {name: _pair(name, total, free) for name in SHOWN if total.get(name)},
        "workers": count_by_kind(names),
    }


def _pair(name: str, total: Mapping[str, float], free: Mapping[str, float]) -> list[float]:
    """[all, free]"""
    return [round(total.get(name, 0.0), 3), round(free.get(name, 0.0), 3)]
