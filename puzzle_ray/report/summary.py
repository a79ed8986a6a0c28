"""What of a report is kept as data beside its page, so that two runs can be laid side by side without their artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from puzzle_ray.errors import StoreError
from puzzle_ray.report.contents import ReportData

SUMMARY = "report.json"
VERSION = 1


def summary(data: ReportData) -> dict[str, Any]:
    """The figures of a run, as JSON. What it has not produced is missing."""
    a = data.architecture
    found: dict[str, Any] = {
        "version": VERSION,
        "parent": data.parent,
        "serving": data.serving,
        "costs": {"are": data.costs_are, "engine": data.engine, "device": data.profile.device if data.profile else ""},
        "metric": data.metric,
        "models": {name: dict(model) for name, model in data.models.items()},
        "stage_seconds": dict(data.stage_seconds),
        "config_yaml": data.config_yaml,
        "versions": {name: str(value) for name, value in data.versions.items()},
        "frontier": [
            {
                "asked": point.asked,
                "speedup": point.architecture.predicted_speedup,
                "objective": point.architecture.objective,
                "kl": data.kl(point),
                "distilled_kl": point.distilled_kl,
            }
            for point in data.sweep
            if point.architecture
        ],
    }
    if a is not None:
        found["architecture"] = {
            "choices": [[choice.attention, choice.ffn] for choice in a.choices],
            "objective": a.objective,
            "limits": dict(a.limits),
            "predicted_speedup": a.predicted_speedup,
            "predicted": asdict(a.predicted),
            "parent_predicted": asdict(a.parent_predicted),
        }
    evaluation = data.evaluation or {}
    kept = ("measured_speedup", "not_measured", "prompt", "samples")
    return found | {name: evaluation[name] for name in kept if name in evaluation}


def checked(found: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Raises StoreError for a summary that this version does not read."""
    if found.get("version") != VERSION:
        remedy = "run report-run with that run's settings once more"
        raise StoreError(where, f"its {SUMMARY} has version {found.get('version')!r}, and {VERSION} is read here", remedy)
    return found
