"""Compare the parent with its child before and after distillation: held-out predictions, and speed measured side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.command import RESULTS, stage_verb
from jobs.run import Run
from puzzle_ray.artifacts import Profile

COLUMNS = (
    ("held-out loss", "heldout_loss", "{:.4f}"),
    ("KL to parent", "kl", "{:.4f}"),
    ("top-1 agree", "top1_agreement", "{:.3f}"),
    ("prefill tok/s", "prefill_tokens_per_s", "{:.0f}"),
    ("decode tok/s", "decode_tokens_per_s", "{:.0f}"),
    ("tok/s", "throughput_tokens_per_s", "{:.0f}"),
    ("MiB", "memory_mib", "{:.1f}"),
    ("params M", "num_params", "{:.3f}"),
)


PREDICTED = (
    ("prefill ms", "prefill_ms"),
    ("decode ms a step", "decode_ms"),
    ("runtime ms", "runtime_ms"),
    ("tok/s", "throughput_tokens_per_s"),
    ("MiB", "memory_mib"),
)


def comparison(found: Mapping[str, Any], profile: Profile) -> list[str]:
    """Predicted (or ESTIMATED) beside measured costs of the parent and the child, and how far the prediction is off."""
    word = "ESTIMATED" if found["estimated"] else "predicted"
    lines = [f"{'':<24}{word:>12}{'measured':>12}{'off by':>9}"]

    def add(title: str, predicted: float, measured: float | None, digits: int = 2) -> None:
        off = f"{predicted / measured - 1:+9.1%}" if measured else ""
        lines.append(f"{title:<24}{predicted:>12.{digits}f}{_written(measured, f'{{:.{digits}f}}'):>12}{off}")

    for title, key in PREDICTED:
        add(f"parent {title}", found["parent_predicted"][key], found["models"]["parent"].get(key))
        add(f"child {title}", found["predicted"][key], found["models"]["child"].get(key))
    add("speed-up", found["predicted_speedup"], found["measured_speedup"], 3)
    by = f"speed is {found['not_measured']}" if "not_measured" in found else f"measured by {found['measured_by']}"
    lines.append(f"{word} by {profile.engine} on {profile.device}, {profile.dtype}; {by}")
    return lines


def _written(value: float | None, form: str) -> str:
    """A dash for what nobody measured. What is rounded to 0 has no sign."""
    if value is None:
        return "-"
    text = form.format(value)
    return text if float(text) else text.removeprefix("-")


def agreement_lines(kept: Mapping[str, Any]) -> list[str]:
    """The child's top-1 agreement and the perplexities by position, and by how frequent the token is."""
    lines = ["in float32, without the last token of each sequence, as nothing follows it (KL and agreement above count it):"]
    for title, key in (
        ("position", "by_position"),
        ("document length", "by_document_length"),
        ("share of the text", "by_frequency"),
    ):
        if kept[key]:
            lines.append(f"{title:<24}{'tokens':>9}{'parent ppl':>12}{'child ppl':>12}{'agree':>8}")
        for row in kept[key]:
            parent, child = row["models"]["parent"], list(row["models"].values())[-1]
            figures = f"{parent['perplexity']:>12.2f}{child['perplexity']:>12.2f}{child['agreement']:>8.3f}"
            lines.append(f"{row['bucket']:<24}{row['tokens']:>9}{figures}")
    return lines


def retrieval_lines(kept: Mapping[str, Any]) -> list[str]:
    """Retrieval of all depths together: the share of numbers that were found, and of choices that were right."""
    rows = [row for row in kept["retrieval"] if row["depth"] is None]
    lines = [f"{'retrieval':<24}{'tokens':>9}{'parent':>16}{'child':>16}   (found, right of 4)"] if rows else []
    for row in rows:
        shown = [row["models"]["parent"], list(row["models"].values())[-1]]
        figures = "".join(f"{own['recall']:>8.0%}{own['choice']:>8.0%}" for own in shown)
        lines.append(f"{row['kind']:<24}{row['tokens']:>9}{figures}")
    return lines


def show(run: Run) -> None:
    """Prints the comparison as a table, then predicted beside measured, then greedy samples."""
    from jobs.stages import evaluation, profile, quality
    from puzzle_ray.evaluation.tasks import task_lines

    found, kept = evaluation.read(run), quality.read(run)
    print(f"{'':<17}" + "".join(f"{title:>15}" for title, _, _ in COLUMNS))
    for name, values in found["models"].items():
        shown = values | {"num_params": values["num_params"] / 1e6}
        cells = [_written(shown.get(key), fmt) for _, key, fmt in COLUMNS]
        print(f"{name.replace('_', ' '):<17}" + "".join(f"{cell:>15}" for cell in cells))
    for name, values in found["models"].items():
        if "downstream_accuracy" in values:
            words = "{downstream_accuracy:.1%} +- {downstream_accuracy_stderr:.1%} of {downstream_questions:.0f} questions right"
            print(f"{name.replace('_', ' ')}: {words.format(**values)}, by log-probability per token")
    print(f"held-out figures: sequences {found['heldout']['test']}, by which no block was scored and no child picked")
    print("\n".join(comparison(found, profile.read(run))))
    print("\n".join([*agreement_lines(kept), *(task_lines(kept["tasks"]) if kept["tasks"] else []), *retrieval_lines(kept)]))
    for name, text in found["samples"].items():
        print(f"{name.replace('_', ' ')}: {text!r}")


def work(run: Run) -> None:
    run.done("quality", "evaluation")
    show(run)


VERB = stage_verb("evaluate-child", __doc__, RESULTS, work)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
