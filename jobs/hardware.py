"""The run for the hardware that is there, where its config says `hardware: auto`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from puzzle_ray.config import HARDWARE
from puzzle_ray.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobs.run import Run
    from puzzle_ray.config import RunConfig
    from puzzle_ray.profiling.nodes import Node


def settled(run: Run, notes: bool = True, quiet: bool = False) -> Run:
    """The run with what the hardware decides, which is said; the same run where nothing is left to it.

    Looked at are the nodes of the Ray that this process has joined, else this machine. With `notes` the store keeps what was decided.
    """
    if run.config.hardware is None:
        return run
    from jobs.run import Run as Settled
    from puzzle_ray.planning.settled import config_of_parent, settle

    if notes:
        run.store.check()
    found = settle(run.config, config_of_parent(run.config), _nodes(run), run.store, notes)
    if not quiet:
        print("\n".join(f"  {line}" for line in found.told()), file=sys.stderr, flush=True)
    other = Settled(found.config, run.progress)
    other.decided = tuple(found.told())
    return other


def _nodes(run: Run) -> Sequence[Node]:
    if run.config.hardware != HARDWARE:  # the config says what there is
        return []
    if run.config.cluster.autoscaling:
        problem = "auto sees the nodes that are there, and cluster.autoscaling adds others"
        raise ConfigError("hardware", problem, 'write what will be there, such as hardware: "1x8 H100-80GB"')
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        from actors.nodes import find_nodes

        return find_nodes(run.config.cluster.placement_timeout_s)
    from puzzle_ray.profiling.nodes import this_machine

    return [this_machine()]


def resolved_on(run: Run, cluster: str | None) -> RunConfig:
    """The settings for a cluster in words, or for the one that is there. Nothing is written; what is decided is said on stderr.

    In words, the store is not asked either: it is what a first run would decide there.
    """
    from contextlib import nullcontext

    from jobs.session import connected, joins
    from puzzle_ray.planning.hardware import Hardware
    from puzzle_ray.planning.settled import settle

    if cluster is not None:
        found = settle(run.config, shape_of(run), Hardware.parse(cluster).as_nodes(), None)
        print("\n".join(f"  {line}" for line in found.told()), file=sys.stderr, flush=True)
        return found.config
    with connected(run.config.cluster) if joins(run.config.cluster) else nullcontext():
        return settled(run, notes=False).config


def shape_of(run: Run) -> Any:
    """The parent's config, without a look at the hub where its shape is known."""
    from puzzle_ray.planning.settled import config_of_parent
    from puzzle_ray.recipes.shapes import published_config

    config = run.config
    known = None if config.revision else published_config(config.parent)
    if known is not None:
        print(f"  {config.parent}: its published shape is taken, and no file is read", file=sys.stderr, flush=True)
        return known
    return config_of_parent(config)
