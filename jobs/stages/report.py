"""The report: one page from everything a run has made."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import yaml

from jobs.run import Run, Stage
from jobs.stages import architecture, evaluation, library, profile, quality, sweep
from puzzle_ray.artifacts import rows_from_parquet
from puzzle_ray.report.contents import ReportData, SweepPoint
from puzzle_ray.search.sweep import SweepPoint as SearchedPoint
from puzzle_ray.store import Artifact
from puzzle_ray.version import __version__

PAGE = "index.html"
PACKAGES = ("ray", "torch", "transformers", "mip", "highspy")


def data(run: Run) -> ReportData:
    """Everything the page shows, from the run's artifacts."""
    from puzzle_ray.distill.gkd import CURVE, LOOKS, GkdRow
    from puzzle_ray.distill.guard import HeldoutRow

    blocks, costs, model_config = library.read(run), profile.read(run), run.parent.model_config
    distilled = run.content("gkd")
    curve, _ = rows_from_parquet(distilled.read(CURVE), GkdRow)
    looks = rows_from_parquet(distilled.read(LOOKS), HeldoutRow)[0] if distilled.exists(LOOKS) else ()
    return ReportData(
        parent=run.config.parent,
        scenario=run.profile_config.scenario,
        num_key_value_heads=model_config.num_key_value_heads,
        intermediate_size=model_config.intermediate_size,
        space=run.space,
        profile=costs,
        scores=architecture.searched_scores(run),
        architecture=architecture.read(run),
        sweep=[_point(p) for p in sweep.read(run)],
        library=blocks.rows(),
        bld_curves=blocks.curves(),
        gkd_curve=[asdict(row) for row in curve],
        gkd_facts=distilled.facts(),
        gkd_looks=[asdict(row) for row in looks],
        evaluation=evaluation.read(run),
        quality=quality.read(run),
        stage_seconds=run.seconds,
        config_yaml=yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False),
        versions={"python": platform.python_version(), "puzzle_ray": __version__} | _versions(),
        machine={"device": costs.device, "processor": platform.machine(), "system": platform.system()},
    )


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

    artifact.write(PAGE, render(data(run)).encode())
    artifact.finish({})


STAGE = Stage("report", work, inputs=("evaluation", "quality", "sweep", "architecture"), reads=("gkd", "profile", "library"))
