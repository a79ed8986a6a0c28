"""Ways to make a child of one measured speed, compared at equal tokens: python -m benchmarks.methods --data ../shared/data --out FILE.json

For every parent and seed, one profile is measured, one library is trained and scored, and all methods share them. For every speed:

- `puzzle`: block distillation (BLD), the MIP with its best answers measured as whole children, global distillation (GKD) by KLD and
  cosine. The child of least KL and the one of the greedy search race on GKD's schedule, unless the second one's KL is more than 1.5
  times as high; the schedule is shorter by what the loser reads.
- `no_race`: the child of least KL before GKD is distilled.
- `distilled_pick`: two answers of the MIP and one without linear blocks are distilled by 4k tokens each, and the one is picked that is
  best then. What the pick read is taken off GKD's tokens.
- `no_gkd`: `puzzle`'s child before GKD. `no_cosine`: the same child, GKD by KLD alone.
- `no_bld`: blocks as they start, before training, with scores, a search and a pick of their own. What BLD read, GKD reads besides.
- `greedy`, `random`: another search of the same scores; `random` is one random architecture within the budget.
- `uniform`: every layer alike, the FFN's width and KV heads just as narrow as the speed needs, by importance, no BLD (as Minitron).
- `depth`: whole layers dropped, those of least influence first. What BLD read, GKD reads besides, here and in `uniform`.
- `iterative`: `puzzle` in two rounds, each with half of the tokens; the first one's child is the second one's parent.

The budget is a throughput on the measured profile. At the end all children of one speed are timed with their parent in turn. KL and
loss are on held-out text that no stage has read. Rows are written one by one, and a run goes on where another one ended.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods_summary import show, summary_of
from benchmarks.record import write
from benchmarks.uniform_width import uniform_choice
from puzzle_ray.artifacts import PARENT, Choices, LayerChoice, Scores
from puzzle_ray.config import RunConfig, load
from puzzle_ray.distill.race import losers_steps
from puzzle_ray.distill.settings import GkdConfig
from puzzle_ray.errors import Infeasible, ProfileError
from puzzle_ray.evaluation.evaluate import predictions, speeds
from puzzle_ray.models.child import choices_of, load_model, quiet_transformers, read_config
from puzzle_ray.pipeline import (
    SEQUENCES,
    Round,
    Setting,
    architecture_of,
    child_of,
    child_with,
    distilled_of,
    library_of,
    parts_of,
    profile_of,
    read_architecture,
    read_profile,
    scores_of,
    tokens_of,
)
from puzzle_ray.process import compute_with, num_cores
from puzzle_ray.profiling.engine import measure_side_by_side
from puzzle_ray.profiling.engines.torch_engine import ENGINE
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.replacements import SCORES_TABLE
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.pick import PICKED
from puzzle_ray.search.searcher import Options
from puzzle_ray.search.setup import SearchSetup
from puzzle_ray.search.tables import predicted_costs
from puzzle_ray.store import Artifact, Store

TEXTS = {"stories260K": "tinystories/train.txt", "chars105": "tinystories/train.txt", "gutenberg7m": "gutenberg"}
PARENTS = ("tiny", *TEXTS)
RATES = {"chars105": 1e-4}  # of GKD: what a range test chooses for this parent; at 1e-3 GKD keeps the start
RATE = 1e-3  # of the others
SPEEDS = (1.25, 1.5, 2.0)
METHODS = (
    "puzzle",
    "distilled_pick",
    "no_race",
    "no_gkd",
    "no_cosine",
    "no_bld",
    "greedy",
    "random",
    "uniform",
    "depth",
    "iterative",
)
BASE = (
    "data.sequence_length=128", "library.calibration_tokens=8192", "library.learning_rate=0.002", "library.micro_batch_tokens=256",
    "profile.scenario={batch_size: 16, input_tokens: 96, output_tokens: 32}", "profile.repeats=7", "search.sweep={speedup: [2.0]}",
    "search.candidates=3", "gkd.num_workers=2", "gkd.micro_batch_tokens=256", "scoring.tokens=8192",
)  # fmt: skip
QUICK = (
    "profile.repeats=2",
    "scoring.tokens=2048",
    "evaluate.tokens=4096",
    "tiny_parent_steps=40",
    "library.calibration_tokens=2048",
)
LEARNS_NOTHING = 1e-12  # a learning rate; a block that is no better than its start is kept as it started


@dataclass(frozen=True)
class Child:
    """What a method made: `start` is the child before GKD, `end` after it, with the tokens that each of them cost."""

    choices: Choices
    start: Artifact
    end: Artifact
    bld_tokens: int
    gkd_tokens: int
    pick_tokens: int = 0


class Bench:
    """One parent and seed: what all methods share."""

    def __init__(self, parent: str, data: Path, seed: int, store: str, overrides: Iterable[str]) -> None:
        where = [] if parent == "tiny" else [f"parent={data / parent}", f"data.train={data / TEXTS[parent]}"]
        where.append(f"gkd.learning_rate={RATES.get(parent, RATE)}")
        self.parent, self.seed = parent, seed
        self.s = Setting(load("tiny", None, (*BASE, *where, *overrides, f"seed={seed}", f"store={store}")), Store(store), Quiet())

    def with_config(self, **sections: Mapping[str, Any]) -> Setting:
        """The setting with other values in some sections."""
        config: RunConfig = self.s.config
        changed = {name: getattr(config, name).model_copy(update=dict(values)) for name, values in sections.items()}
        return Setting(config.model_copy(update=changed), self.s.store, self.s.progress)

    @cached_property
    def tokens(self) -> Artifact:
        return tokens_of(self.s)

    @cached_property
    def profile(self) -> Artifact:
        return profile_of(self.s)

    @cached_property
    def library(self) -> Artifact:
        return library_of(self.s, self.tokens)

    @cached_property
    def untrained(self) -> Setting:
        config = self.s.config.library
        return self.with_config(library={"tokens": config.micro_batch_tokens, "learning_rate": LEARNS_NOTHING})

    def setup(self, scores: Artifact, speed: float) -> SearchSetup:
        search = self.s.config.search
        found, costs = Scores.from_parquet(scores.read(SCORES_TABLE)), read_profile(self.s, self.profile)
        numbers = (self.s.space, found, costs, self.s.profile_config.scenario, self.s.config.scoring.metric)
        return SearchSetup(*numbers, search.searcher, search.time_limit_s, Limits(speedup=speed), self.seed)

    def searched(self, setup: SearchSetup, searcher: str, samples: int = 1000) -> Choices:
        options = Options(time_limit_s=setup.time_limit_s, seed=self.seed, samples=samples)
        return setup.tables.search(setup.limits, searcher=searcher, options=options)[0].architecture.choices

    def picked(
        self, s: Setting, library: Artifact, scores: Artifact, speed: float, gkd: GkdConfig | None = None, **how: Any
    ) -> tuple[Choices, int]:
        """The best of the MIP's answers by measured KL, or as `how` says, and the tokens that it took; what a race's winner read is none.

        `gkd` is what those that race begin.
        """
        search = s.config.search.model_copy(update={"limits": Limits(speedup=speed)} | how)
        other = Setting(s.config.model_copy(update={"search": search, "gkd": gkd or s.config.gkd}), s.store, s.progress)
        found = architecture_of(other, self.tokens, library, self.profile, scores)
        report = found.read_json(PICKED)
        kls = {tuple(row["choices"]) for row in (*report["candidates"], report["picked"]) if "kl_distilled" in row}
        lost = [row["rungs"][-1]["tokens"] for row in report.get("race", ()) if not row["rungs"][-1]["goes_on"]]
        return read_architecture(found).choices, len(kls) * search.distil_tokens + sum(lost)

    def gkd(self, preset: str, tokens: int) -> GkdConfig:
        given = self.s.config.gkd.model_dump(exclude={"kl_weight", "cosine_weight", "lm_weight", "preset"})
        return GkdConfig.model_validate(given | {"preset": preset, "tokens": tokens})

    def distilled(self, start: Artifact, preset: str, tokens: int) -> Artifact:
        s = Setting(self.s.config.model_copy(update={"gkd": self.gkd(preset, tokens)}), self.s.store, self.s.progress)
        return distilled_of(s, self.tokens, start)

    def predicted_speedup(self, choices: Choices) -> float | None:
        """On the measured profile; None where it has not all of these shapes, as with a uniform width."""
        costs, scenario, space = read_profile(self.s, self.profile), self.s.profile_config.scenario, self.s.whole_space
        try:
            parent, child = (predicted_costs(space, costs, scenario, c) for c in ([LayerChoice()] * len(choices), choices))
        except ProfileError:
            return None
        return child.throughput_tokens_per_s / parent.throughput_tokens_per_s


# methods: each makes a child of a speed, or none where it cannot


def _full(
    bench: Bench,
    choices: Choices,
    library: Artifact,
    *,
    bld: bool,
    gkd: bool = True,
    preset: str = "kld+cosine",
    pick_tokens: int = 0,
) -> Child:
    """A child of a library, distilled by the tokens of GKD that the pick has left, and by those of BLD too where `bld` is false."""
    config = bench.s.config
    tokens = (config.gkd.tokens - pick_tokens + (0 if bld else config.library.tokens)) if gkd else 0
    start = child_with(bench.s, library, choices)
    end = bench.distilled(start, preset, tokens) if gkd else start
    return Child(choices, start, end, config.library.tokens if bld else 0, tokens, pick_tokens)


RACE: dict[str, Any] = {"rivals": ("greedy",), "race_rungs": 3}
DISTILLED = {"distil_tokens": 4_096, "without": ("linear",), "candidates": 2}


def _puzzle(bench: Bench, speed: float, pick: Mapping[str, Any] | None = None, **how: Any) -> Child:
    """With the pick that `pick` says, by default a race."""
    scores = scores_of(bench.s, bench.tokens, bench.library)
    if pick is None:
        choices, spent = _raced(bench, bench.s, bench.library, scores, speed, bench.s.config.gkd.tokens)
    else:
        choices, spent = bench.picked(bench.s, bench.library, scores, speed, **pick)
    return _full(bench, choices, bench.library, bld=True, pick_tokens=spent, **how)


def _raced(bench: Bench, s: Setting, library: Artifact, scores: Artifact, speed: float, tokens: int) -> tuple[Choices, int]:
    """The winner of a race, with the losers' part of `tokens`. Where only one is to race, nothing is taken off its schedule."""
    most = s.config.search.model_copy(update=RACE).most_racing
    left = tokens_beside_a_race(bench.gkd("kld+cosine", tokens), most, RACE["race_rungs"])
    choices, spent = bench.picked(s, library, scores, speed, bench.gkd("kld+cosine", left), **RACE)
    return choices, tokens - left if spent else 0


def tokens_beside_a_race(gkd: GkdConfig, racing: int, rungs: int) -> int:
    """Of the longest schedule that, with what the losers of a race on it read, takes no more steps than `gkd`."""
    each = gkd.micro_batch_tokens * gkd.num_workers * gkd.gradient_accumulation
    for steps in range(gkd.total_steps, 0, -1):
        shorter = gkd.model_copy(update={"tokens": steps * each})
        if steps + losers_steps(racing, shorter.race_steps(rungs)) <= gkd.total_steps:
            return steps * each
    raise ValueError(f"{gkd.total_steps} steps are too few for a race of {racing}")


def _searched_by(searcher: str, samples: int = 1000) -> Callable[[Bench, float], Child]:
    def make(bench: Bench, speed: float) -> Child:
        setup = bench.setup(scores_of(bench.s, bench.tokens, bench.library), speed)
        return _full(bench, bench.searched(setup, searcher, samples), bench.library, bld=True)

    return make


def _no_bld(bench: Bench, speed: float) -> Child:
    library = library_of(bench.untrained, bench.tokens)
    scores = scores_of(bench.untrained, bench.tokens, library)
    tokens = bench.s.config.gkd.tokens + bench.s.config.library.tokens
    choices, spent = _raced(bench, bench.untrained, library, scores, speed, tokens)
    return _full(bench, choices, library, bld=False, pick_tokens=spent)


def _depth(bench: Bench, speed: float) -> Child:
    setup = bench.setup(scores_of(bench.s, bench.tokens, bench.library), speed)
    return _full(bench, bench.searched(setup, "depth"), bench.library, bld=False)  # what it drops has no weights


def _uniform(bench: Bench, speed: float) -> Child | None:
    s = bench.s
    costs, width = read_profile(s, bench.profile), s.model_config.intermediate_size
    choice = uniform_choice(s.whole_space, costs, s.profile_config.scenario, width, s.config.space.ffn_multiple_of, speed)
    if choice is None:
        return None
    space = bench.s.config.space.model_copy(update={"attention": (PARENT, choice.attention), "ffn": (PARENT, choice.ffn)})
    s = Setting(bench.untrained.config.model_copy(update={"space": space}), bench.s.store, bench.s.progress)
    return _full(bench, (choice,) * len(bench.s.space.layers), library_of(s, bench.tokens), bld=False)


def _iterative(bench: Bench, speed: float) -> Child:
    """Two rounds, each with half of the tokens."""
    config, half = bench.s.config, {"tokens": bench.s.config.library.tokens // 2}
    search = {"limits": Limits(speedup=speed)}
    changed = bench.with_config(library=half, gkd={"tokens": config.gkd.tokens // 2}, search=search)
    s = Setting(changed.config.model_copy(update={"rounds": 2}), bench.s.store, bench.s.progress)
    while True:
        library = library_of(s, bench.tokens)
        architecture = architecture_of(s, bench.tokens, library, bench.profile, scores_of(s, bench.tokens, library))
        start = child_of(s, library, architecture)
        end = distilled_of(s, bench.tokens, start)
        if s.number == s.config.rounds:
            break
        s = replace(s, after=Round(s, library, read_architecture(architecture).choices, end))
    choices = choices_of(read_config(Path(end.path("child"))))
    return Child(choices, start, end, 2 * s.config.library.tokens, 2 * s.config.gkd.tokens)


MAKERS: dict[str, Callable[[Bench, float], Child | None]] = {
    "puzzle": _puzzle,
    "distilled_pick": lambda bench, speed: _puzzle(bench, speed, pick=DISTILLED),
    "no_race": lambda bench, speed: _puzzle(bench, speed, pick={}),
    "no_gkd": lambda bench, speed: _puzzle(bench, speed, gkd=False),
    "no_cosine": lambda bench, speed: _puzzle(bench, speed, preset="kld"),
    "no_bld": _no_bld,
    "greedy": _searched_by("greedy"),
    "random": _searched_by("random", samples=1),
    "uniform": _uniform,
    "depth": _depth,
    "iterative": _iterative,
}


def row_of(bench: Bench, speed: float, method: str) -> dict[str, Any]:
    """One child, made and compared with its parent on held-out text. `kl` is None where the method reaches no child of this speed."""
    row: dict[str, Any] = {"parent": bench.parent, "seed": bench.seed, "speed": speed, "method": method, "kl": None}
    try:
        made = MAKERS[method](bench, speed)
    except Infeasible as error:
        return row | {"problem": str(error)}
    if made is None:
        return row | {"problem": "no uniform width is narrow enough"}
    folders = {"parent": str(bench.s.parent), "start": made.start.path("child"), "end": made.end.path("child")}
    batches = parts_of(bench.s, bench.tokens).test.first(bench.s.config.evaluate.tokens, SEQUENCES)
    with quiet_transformers():
        found = predictions({name: load_model(folder) for name, folder in folders.items()}, batches)
    facts = made.end.facts() if made.gkd_tokens else {}
    parent, start, end = (found[name] for name in folders)
    row |= {"kl_before": start["kl"], "kl": end["kl"], "top1": end["top1_agreement"], "heldout_tokens": end["heldout_tokens"]}
    row |= {"loss_parent": parent["heldout_loss"], "loss_before": start["heldout_loss"], "loss": end["heldout_loss"]}
    row |= {
        "predicted_speedup": bench.predicted_speedup(made.choices),
        "measured_speedup": None,
        "child": f"{made.end.name}/child",
    }
    row |= {"bld_tokens": made.bld_tokens, "pick_tokens": made.pick_tokens, "gkd_tokens": made.gkd_tokens}
    row["layers"] = [choice.label for choice in made.choices]
    return row | {name: facts.get(name) for name in ("kept", "returns", "learning_rate")}


def measure_speeds(bench: Bench, rows: Sequence[dict[str, Any]], repeats: int) -> None:
    """Times the children of one speed and their parent in turn, in the profile's scenario, and writes the ratios into the rows. Children
    of the same shapes are as fast as each other: one of them is timed."""
    made = [row for row in rows if row["kl"] is not None]
    folders = {" | ".join(row["layers"]): f"{bench.s.store.root}/{row['child']}" for row in made}
    scenario = bench.s.profile_config.scenario
    compute_with(num_cores())
    with quiet_transformers():
        models = {name: load_model(folder, torch.float32) for name, folder in {"parent": str(bench.s.parent), **folders}.items()}
    rates = speeds(measure_side_by_side(models, scenario, repeats, ENGINE), scenario)
    parent = rates["parent"]["throughput_tokens_per_s"]
    for row in made:
        row["measured_speedup"] = rates[" | ".join(row["layers"])]["throughput_tokens_per_s"] / parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of parents and texts")
    parser.add_argument("--parents", nargs="+", default=PARENTS, choices=PARENTS)
    parser.add_argument("--speeds", nargs="+", type=float, default=SPEEDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=tuple(MAKERS))
    parser.add_argument("--tokens", type=int, default=139_264, help="of every GKD, the pick's included")
    parser.add_argument("--bld-tokens", type=int, default=8_192, help="of the library")
    parser.add_argument("--store", help="a folder to keep (default: a temporary one, so that nothing is reused)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="settings of all methods: section.key=value")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of rows; those in it are not made again")
    parser.add_argument("--quick", action="store_true", help="few tokens, one seed, one speed")
    given = parser.parse_args()
    words: tuple[str, ...] = (f"gkd.tokens={given.tokens}", f"library.tokens={given.bld_tokens}", *given.overrides)
    if given.quick:
        quick = (*QUICK, "gkd.tokens=10240", "library.tokens=4096")
        words, given.seeds, given.speeds = (*words, *quick), given.seeds[:1], [1.5]
    rows: list[dict[str, Any]] = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    if not given.store:  # a child that was not timed is not there any more
        rows = [row for row in rows if row["kl"] is None or row["measured_speedup"]]

    def save() -> None:
        rates = {row["parent"]: RATES.get(row["parent"], RATE) for row in rows}
        write(given.out, rows, summary_of(rows) | {"settings": [*BASE, *words], "gkd_learning_rates": rates})

    with tempfile.TemporaryDirectory() as scratch:
        for seed in given.seeds:
            for parent in given.parents:
                bench = Bench(parent, given.data, seed, given.store or scratch, words)
                for speed in given.speeds:
                    this = [r for r in rows if (r["parent"], r["seed"], r["speed"]) == (parent, seed, speed)]
                    there = {row["method"] for row in this}
                    for method in (method for method in given.methods if method not in there):
                        this.append(row_of(bench, speed, method))
                        rows.append(this[-1])
                        show(rows[-1])
                        save()
                    timed = [row for row in this if row["kl"] is not None]
                    if any(row["measured_speedup"] is None for row in timed):
                        measure_speeds(bench, timed, 3 if given.quick else 25)
                        print(" ".join(f"{row['method']} {row['measured_speedup']:.3f} x" for row in timed), flush=True)
                        save()
    json.dump(summary_of(rows), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
