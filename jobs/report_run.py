"""Makes the run's page: frontier, the child layer by layer, tables, curves."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING

import yaml

from jobs.cli import run_main, stage_command
from puzzle_ray.artifacts import rows_from_parquet
from puzzle_ray.distill.gkd import CURVE, GkdRow
from puzzle_ray.distill.library import Library
from puzzle_ray.report.page import ReportData, SweepPoint
from puzzle_ray.search.sweep import read

if TYPE_CHECKING:
    from jobs.stages import Run

PACKAGES = ("puzzle_ray", "ray", "torch", "transformers", "mip", "highspy")


def report_data(run: Run) -> ReportData:
    """Everything the page shows, from the run's artifacts."""
    library = Library(run.library)
    curve, _ = rows_from_parquet(run.distilled.read(CURVE), GkdRow)
    points = [SweepPoint(p.speedup_asked, p.architecture, p.infeasible_reason, p.label) for p in read(run.sweep)]
    return ReportData(
        parent=run.config.parent,
        scenario=run.profile_config.scenario,
        num_key_value_heads=run.model_config.num_key_value_heads,
        intermediate_size=run.model_config.intermediate_size,
        space=run.space,
        profile=run.profile,
        scores=run.searched_scores,
        architecture=run.architecture,
        sweep=points,
        library=library.rows(),
        bld_curves=library.curves(),
        gkd_curve=[asdict(row) for row in curve],
        evaluation=run.evaluation,
        stage_seconds=run.seconds,
        config_yaml=yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False),
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        machine={"device": run.profile.device, "processor": platform.machine(), "system": platform.system()},
    )


def work(run: Run) -> None:
    print(run.report.path("index.html"))


main = stage_command(work, __doc__ or "")

if __name__ == "__main__":
    run_main(main)
