"""Find the best architecture within the limits: one variant per layer, by mixed-integer programming, and by measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.command import STAGES, stage_verb
from jobs.run import Run
from puzzle_ray.artifacts import Architecture, SearchSpace
from puzzle_ray.search.finalists import outcome
from puzzle_ray.search.interactions import NOT_MEASURED
from puzzle_ray.search.measured import kl_or_inf


def describe(architecture: Architecture, space: SearchSpace) -> str:
    """One line per layer, counted from the original in every round, then cost and proof."""
    choices = [choice.on(layer.now) for choice, layer in zip(architecture.choices, space.layers, strict=True)]
    lines = [f"  layer {i:3d}  {c.attention:<10} {c.ffn}" for i, c in enumerate(choices)]
    predicted, parent = architecture.predicted, architecture.parent_predicted
    own, other = "", ""
    if predicted.batch_size != parent.batch_size:
        own, other = f" at batch {predicted.batch_size}", f" at batch {parent.batch_size}"
    lines += [
        f"  predicted: {architecture.predicted_speedup:.3f} x faster ({predicted.runtime_ms:.1f} ms{own} for the parent's "
        f"{parent.runtime_ms:.1f}{other}), {predicted.memory_mib:.2f} MiB for {parent.memory_mib:.2f}, "
        f"{predicted.num_params / 1e6:.3f}M parameters for {parent.num_params / 1e6:.3f}M"
        + (" (ESTIMATED, not measured)" if architecture.estimated else ""),
        f"  sum of {architecture.metric} {architecture.objective:.6f}, proven bound {architecture.bound:.6f}, {architecture.status}, "
        f"{1e3 * architecture.solve_s:.0f} ms by {architecture.searcher}{unsolved(architecture)}",
    ]
    return "\n".join(lines)


def unsolved(architecture: Architecture) -> str:
    """Which batch sizes had no answer when the time limit came; empty where there is none."""
    sizes = ", ".join(map(str, architecture.unsolved_batch_sizes))
    return f"; not solved in time: batch size {sizes}" if sizes else ""


def candidates(report: Mapping[str, Any], number: int = 1) -> str:
    """What was measured in round `number`: candidates by measured KL, how far the scores were off, the local search, interactions."""
    against = f", against the child of round {number - 1}" if number > 1 else ""
    lines = [
        f"  measured on {report['tokens']} held-out tokens{against}:",
        "    sum of scores   true KL  +- stderr  top-1   from",
    ]
    for row in sorted(report["candidates"], key=lambda row: kl_or_inf(row["kl"])):
        lines.append(_measured(row, f"{row['origin']}, {row['layers_unlike_first']} layers unlike the first", number))
    lines += [f"    {name} left out: {reason}" for name, reason in report["left_out"].items()]
    if report["local_search"]:
        accepted = sum(row["accepted"] for row in report["local_search"])
        lines.append(f"  local search: {len(report['local_search'])} children measured, {accepted} exchanges accepted")
        lines += [f"    {'; '.join(row['exchanges'])}" for row in report["local_search"] if row["accepted"]]
    lines += race_lines(report.get("race", ()), number)
    lines += ["  picked:", _measured(report["picked"], report["picked"]["origin"], number)]
    off = report["prediction"]
    if off["mean_predicted_over_measured"] is not None:
        lines.append(f"  sum of scores over true KL: {off['mean_predicted_over_measured']:.2f} on average")
    if off["rank_correlation"] is not None:
        lines[-1] += f", rank correlation {off['rank_correlation']:.2f}"
    if report["interactions"]:
        lines.append("  pairs of much-used blocks: KL with both, less the sum of each alone")
    else:
        lines.append(f"  {NOT_MEASURED}")
    for row in sorted(report["interactions"], key=lambda row: -abs(row["interaction"])):
        lines.append(f"    {row['interaction']:+.5f} = {row['kl_both']:.5f} - {row['kl_a']:.5f} - {row['kl_b']:.5f}  "
                     f"{row['a']} with {row['b']}")  # fmt: skip
    return "\n".join(lines)


def race_lines(rows: Sequence[Mapping[str, Any]], number: int = 1) -> list[str]:
    """A table of a race in round `number`: every finalist's held-out KL at each rung that it came to, and where it stopped; empty where
    none was run."""
    if not rows:
        return []
    rungs = max((row["rungs"] for row in rows), key=len)
    of = f" to the original (at the start to the child of round {number - 1})" if number > 1 else ""
    lines = [f"  race on GKD's schedule, held-out KL{of} by tokens read:"]
    lines.append(f"    {'start':>9} " + " ".join(f"{rung['tokens']:>9,}" for rung in rungs) + "   from")
    for row in sorted(rows, key=lambda row: (-len(row["rungs"]), row["rungs"][-1]["kl"])):
        kls = [f"{rung['kl']:9.5f}" for rung in row["rungs"]] + [" " * 9] * (len(rungs) - len(row["rungs"]))
        lines.append(
            f"    {row['kl']:9.5f} {' '.join(kls)}   {' = '.join([row['origin'], *row['also']])}, {outcome(row['rungs'])}"
        )
    return lines


def _measured(row: Mapping[str, Any], words: str, number: int) -> str:
    if (distilled := row.get("kl_distilled")) is not None:
        words += f"; distilled for a while {distilled:.5f}{' to the original' if number > 1 else ''}"
    return f"    {row['predicted']:13.5f} {row['kl']:9.5f} {row['stderr']:10.5f} {row['top1_agreement']:6.3f}   {words}"


def work(run: Run) -> None:
    from jobs.stages import architecture

    run.done("architecture")
    print(describe(architecture.read(run), run.space))
    report = architecture.measurements(run)
    if report is not None:
        print(candidates(report, run.number))


VERB = stage_verb("search-architecture", __doc__, STAGES, work)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
