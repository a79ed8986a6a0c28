"""Count what a run will need before anything is started: bytes per process, object store, checkpoints, FLOPs and hours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.command import SEARCHES, Config, Data, Debug, ParentName, Recipe, Settings, StoreRoot, Verb, configured

if TYPE_CHECKING:
    from puzzle_ray.planning.hardware import Hardware
    from puzzle_ray.planning.needs import Demand, Work

GIB = 1 << 30


def table(demands: Sequence[Demand], works: Sequence[Work], hardware: Hardware, mfu: float) -> list[str]:
    """The plan in lines: processes, then stages, then what does not fit."""
    from puzzle_ray.planning.hardware import host_bytes, problems

    lines = [f"{'stage':<12}{'process':<16}{'count':>6}{'GiB each':>10}  {'of which GiB'}"]
    for demand in demands:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in demand.parts.items())
        share = demand.gpu_share
        where = f"{share:g} GPUs'" if share > 1 else f"a {share:g} GPU's" if share else "a host's"
        words = f"{parts} (in {where} memory)"
        if demand.host:
            words += ", " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in demand.host.items()) + " (in a host's memory)"
        lines.append(f"{demand.stage:<12}{demand.process:<16}{demand.count:>6}{demand.total / GIB:>10.2f}  {words}")
    lines.append("")
    titles = f"{'stage':<12}{'PFLOP':>12}{'GPUs':>6}{'hours':>10}{'store GiB':>12}{'store bytes/token':>19}{'checkpoint GiB':>16}"
    lines.append(titles)
    for work in works:
        gpus, hours = (f"{hardware.busy_gpus(work):g}", f"{hardware.hours(work, mfu):.2f}") if work.on_gpus else ("none", "?")
        lines.append(
            f"{work.stage:<12}{work.flops / 1e15:>12.1f}{gpus:>6}{hours:>10}{work.store_bytes / GIB:>12.2f}"
            f"{work.store_bytes_per_token:>19}{work.checkpoint_bytes / GIB:>16.2f}"
        )
    words = f"so many {hardware.name} of {hardware.num_gpus}, busy at {mfu:.0%} of their peak rate"
    words += "" if all(work.on_gpus for work in works) else "; how long CPUs take is not known"
    lines.append(f"hours: {words}; every stage apart; the child counts as large as the parent")
    hosts = ", ".join(f"{stage} {held / GIB:.2f}" for stage, held in host_bytes(demands).items() if held)
    lines += [f"GiB of all hosts' memory together, beside what libraries take: {hosts}"] if hosts else []
    found = problems(demands, hardware)
    return [*lines, "", *(found or ["every process fits the GPUs that it is given"])]


def call(
    cluster: Annotated[str, typer.Option(help='Nodes x GPUs and a device, such as "8x8 H100-80GB".')],
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the peak rate that the GPUs reach.")] = 0.4,
    recipe: Recipe = None,
    config: Config = None,
    set_: Settings = None,
    parent: ParentName = None,
    data: Data = None,
    store: StoreRoot = None,
    debug: Debug = False,
) -> None:
    from jobs.hardware import shape_of
    from puzzle_ray.config import TINY
    from puzzle_ray.errors import ConfigError
    from puzzle_ray.export.target import configured_space
    from puzzle_ray.planning.demand import Sizes, demands, works
    from puzzle_ray.planning.hardware import Hardware
    from puzzle_ray.planning.resolve import idle, with_workers_that_start
    from puzzle_ray.planning.settled import settle

    hardware = Hardware.parse(cluster)
    run = configured(recipe, config, set_, parent, data, store)
    settings = run.config
    if settings.parent == TINY:
        raise ConfigError("parent", "the tiny parent is trained first and fits anywhere", "name a parent: a folder or a hub id")
    model_config = shape_of(run)
    found = settle(settings, model_config, hardware.as_nodes(), None)
    settings = found.config
    if found.lines:
        print("\n".join([*(f"hardware: {line}" for line in found.lines), ""]))
    space = configured_space(model_config, settings.space, settings.search.target_format)
    sizes = Sizes(model_config, space)
    needed = demands(with_workers_that_start(settings, hardware.num_gpus), model_config, sizes, hardware.gpu_bytes)
    lines = table(needed, works(settings, model_config, sizes), hardware, mfu)
    print("\n".join([*lines, *idle(settings, hardware.num_gpus)]))


call.__doc__ = __doc__
VERB = Verb("plan", SEARCHES, call)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
