"""The report: one page from everything a run has made."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from jobs.run import Run, Stage
from jobs.stages import architecture, evaluation, library, profile, quality, scores, sweep
from puzzle_ray.config import TINY
from puzzle_ray.families.registry import ffn_width, num_kv_heads
from puzzle_ray.report.contents import ReportData, SweepPoint
from puzzle_ray.rows import rows_from_parquet
from puzzle_ray.search.sweep import SweepPoint as SearchedPoint
from puzzle_ray.store import Artifact
from puzzle_ray.version import __version__

PAGE = "index.html"
PACKAGES = ("ray", "torch", "transformers", "mip", "highspy")


def data(run: Run, done: Collection[str] | None = None) -> ReportData:
    """Everything the page shows, from the run's artifacts. With `done`, from those of these stages alone."""
    whole = ReportData(
        parent=run.config.parent,
        round=run.number,
        stage_seconds=run.seconds,
        config_yaml=yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False),
        versions={"python": platform.python_version(), "puzzle_ray": __version__} | _versions(),
        machine={"processor": platform.machine(), "system": platform.system()},
    )
    for stage, part in PARTS.items():
        if done is None or stage in done:
            whole = replace(whole, **part(run))
    return whole


def so_far(run: Run, done: Collection[str]) -> ReportData | None:
    """What can be shown when these stages are finished; None before there is a parent."""
    if run.config.parent == TINY and "tiny_parent" not in done:
        return None
    return data(run, done)


def _of_tokens(run: Run) -> dict[str, Any]:
    model_config = run.parent.model_config
    heads, width = num_kv_heads(model_config), ffn_width(model_config)  # under whatever names: GPT-2 and OPT have others
    read = run.content("tokens").facts().get("sources", ())  # tokens of earlier versions have none
    return {"num_key_value_heads": heads, "intermediate_size": width, "space": run.space, "text_sources": read}


def _of_profile(run: Run) -> dict[str, Any]:
    costs = profile.read(run)
    machine = {"device": costs.device, "processor": platform.machine(), "system": platform.system()}
    return {"scenario": run.profile_config.scenario, "profile": costs, "machine": machine}


def _of_library(run: Run) -> dict[str, Any]:
    blocks = library.read(run)
    return {"library": blocks.rows(), "bld_curves": blocks.curves()}


def _of_architecture(run: Run) -> dict[str, Any]:
    found = {"scores": architecture.searched_scores(run), "architecture": architecture.read(run)}
    return found | {"picked": architecture.measurements(run) or {}}


def _of_gkd(run: Run) -> dict[str, Any]:
    from puzzle_ray.distill.gkd import CURVE, LOOKS
    from puzzle_ray.distill.gkd_trainer import GkdRow
    from puzzle_ray.distill.guard import HeldoutRow

    distilled = run.content("gkd")
    curve, _ = rows_from_parquet(distilled.read(CURVE), GkdRow)
    looks = rows_from_parquet(distilled.read(LOOKS), HeldoutRow)[0] if distilled.exists(LOOKS) else ()
    rows = {"gkd_curve": [asdict(row) for row in curve], "gkd_looks": [asdict(row) for row in looks]}
    return rows | {"gkd_facts": distilled.facts()}


# Stage -> what it adds to the page; what a later one says counts.
PARTS: Mapping[str, Callable[[Run], dict[str, Any]]] = {
    "tokens": _of_tokens,
    "profile": _of_profile,
    "library": _of_library,
    "scores": lambda run: {"scores": scores.read(run)},
    "architecture": _of_architecture,
    "sweep": lambda run: {"sweep": [_point(point) for point in sweep.read(run)]},
    "gkd": _of_gkd,
    "evaluation": lambda run: {"evaluation": evaluation.read(run)},
    "quality": lambda run: {"quality": quality.read(run)},
}


def _point(point: SearchedPoint) -> SweepPoint:
    distilled_kl = point.distilled["kl"] if point.distilled else None
    return SweepPoint(point.speedup_asked, point.architecture, point.why_none, point.label, point.measured_kl, distilled_kl)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def work(run: Run, artifact: Artifact) -> None:
    from puzzle_ray.report.page import render
    from puzzle_ray.report.summary import SUMMARY, summary

    found = data(run)
    artifact.write(PAGE, render(found).encode())
    artifact.write_json(SUMMARY, summary(found))
    artifact.finish({})


STAGE = Stage("report", work, inputs=("evaluation", "quality", "sweep", "architecture"), reads=("gkd", "profile", "library"))
