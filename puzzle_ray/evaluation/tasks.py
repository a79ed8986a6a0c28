"""Parent and children on the same tasks: every entry's figures, and what each child retained, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle_ray.evaluation.breakdown import PARENT
from puzzle_ray.evaluation.retained import Paired, Retained, retained

METRICS = ("acc_norm", "acc", "exact_match", "f1", "em")  # the first of them that a task has stands for it


@dataclass(frozen=True)
class TaskAnswers:
    """One model's answers. `values`: task -> metric -> a value per question, in order, for metrics that are means.

    `figures`: task -> metric -> value, for all metrics. A metric is named with its filter, such as `acc,none`.
    """

    values: Mapping[str, Mapping[str, Sequence[float]]]
    figures: Mapping[str, Mapping[str, float]]


def values_of(task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """`acc,none` -> one value per document, for the metrics that are means of such values, and of which more is better.

    Of others, such as the share of stereotypes, a child that has more than its parent has kept nothing more.
    """
    is_better = task.higher_is_better()
    found: dict[str, dict[int, float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            aggregation = task.aggregation().get(metric)
            is_mean = aggregation is None or getattr(aggregation, "__name__", "") == "mean"
            if is_mean and is_better.get(metric) is not False and isinstance(sample[metric], bool | int | float):
                found.setdefault(f"{metric},{sample['filter']}", {})[sample["doc_id"]] = float(sample[metric])
    return {key: [values[i] for i in sorted(values)] for key, values in found.items()}


def compare_tasks(
    entries: Mapping[str, Sequence[str]],
    models: Mapping[str, TaskAnswers],
    chances: Mapping[str, float],
    seed: int,
    resamples: int,
    confidence: float,
) -> dict[str, Any]:
    """Compares all models with the one named `parent`. An entry is one task or several.

    JSON-able: `entries` (rows of `entry`, `metric`, `questions`, `models`: name -> what it retained of the parent), `mean` (the same of
    the mean over entries; None where there is none) and `figures` (task -> metric -> model -> value). `chance` is known for multiple
    choice. Entries without a metric that is a mean are in `figures` alone.
    """
    parent = models[PARENT]
    main = {name: _main_metric([parent.values[task] for task in tasks]) for name, tasks in entries.items()}
    main = {name: metric for name, metric in main.items() if metric}
    of_models: dict[str, dict[str, Retained]] = {}
    for name, model in models.items():
        paired = {
            entry: [_paired(task, metric, parent, model, chances) for task in entries[entry]] for entry, metric in main.items()
        }
        of_models[name] = retained(paired, seed, resamples, confidence)
    rows = [_row(entry, metric, of_models) for entry, metric in main.items()]
    figures = {
        task: {metric: {name: model.figures[task][metric] for name, model in models.items()} for metric in own}
        for task, own in parent.figures.items()
    }
    return {"entries": rows, "mean": _row("", "", of_models) if rows else None, "figures": figures, "confidence": confidence}


def _row(entry: str, metric: str, of_models: Mapping[str, Mapping[str, Retained]]) -> dict[str, Any]:
    own = {name: found[entry] for name, found in of_models.items()}
    name = metric.partition(",")[0]
    return {
        "entry": entry,
        "metric": name,
        "questions": own[PARENT].questions,
        "models": {name: found.to_json() for name, found in own.items()},
    }


def _main_metric(of_tasks: Sequence[Mapping[str, Sequence[float]]]) -> str:
    """The one that stands for an entry; every task of it has it. Empty where there is none."""
    shared = [metric for metric in of_tasks[0] if all(metric in own for own in of_tasks)]
    known = [metric for wanted in METRICS for metric in shared if metric.partition(",")[0] == wanted]
    return next(iter([*known, *shared]), "")


def _paired(task: str, metric: str, parent: TaskAnswers, child: TaskAnswers, chances: Mapping[str, float]) -> Paired:
    is_accuracy = metric.startswith("acc")
    return Paired(parent.values[task][metric], child.values[task][metric], chances.get(task) if is_accuracy else None)


def task_lines(found: Mapping[str, Any]) -> list[str]:
    """The comparison as lines for a terminal: what the last child kept, by entry and on the mean."""
    if not found["entries"]:
        return []
    confidence = f"{found['confidence']:.0%}"
    lines = [f"{'task':<24}{'metric':>10}{'questions':>11}{'parent':>9}{'child':>9}   kept ({confidence} interval)"]
    rows = [*found["entries"], *([found["mean"] | {"entry": "mean"}] if len(found["entries"]) > 1 else [])]
    for row in rows:
        own = list(row["models"].values())[-1]
        kept = own["retained"]
        words = "-" if kept is None else f"{kept['value']:.1%} {interval_words(kept, own)}"
        remark = guess_remark(own)
        figures = f"{own['parent']['value']:>9.1%}{own['child']['value']:>9.1%}"
        lines.append(f"{row['entry']:<24}{row['metric']:>10}{row['questions']:>11}{figures}   {words}{remark and f'; {remark}'}")
    return lines


def interval_words(interval: Mapping[str, float | None], own: Mapping[str, Any]) -> str:
    """The bounds of an interval of what `own` kept, or why there are none."""
    if interval["low"] is None or interval["high"] is None:
        return f"(no interval: {why_no_interval(own)})"
    return f"({interval['low']:.1%} to {interval['high']:.1%})"


def why_no_interval(own: Mapping[str, Any]) -> str:
    """Why the share that was kept has none."""
    if own["parent"]["low"] is None:
        return "one question" if own["questions"] == 1 else "too few questions that differ"
    if own["difference"]["low"] is None:
        return "parent and child differ in no question"
    if own["child"]["value"] == 0:
        return "the child is right in no question"
    return "the parent is too close to 0"


def guess_remark(own: Mapping[str, Any]) -> str:
    """What must be said beside a share that was kept of what guessing gives."""
    if own["chance"] is None:
        return ""
    if own["above_chance"] is None:
        alike = own["parent"]["low"] is None and own["parent"]["value"] > own["chance"]
        words = "too few questions to tell the parent from guessing" if alike else "the parent is not above guessing"
        return f"{words} ({own['chance']:.1%})"
    return f"{own['above_chance']['value']:.1%} of what is above guessing"
