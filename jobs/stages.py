"""The stages of a run, each computed when first asked for, kept in the store, and skipped when it is there already."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from jobs.inputs import Inputs
from puzzle_ray.artifacts import Architecture, LayerChoice, Profile, Scores, to_json
from puzzle_ray.data.sources import source_fingerprint
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.store import Artifact

ARCHITECTURE = "architecture.json"
SCORES = "scores.parquet"
EVALUATION = "evaluation.json"


class Run(Inputs):
    """All stages of one config. Asking for a stage does it, and first all it depends on."""

    # library, profile, scores

    @cached_property
    def library(self) -> Artifact:
        from puzzle_ray.distill.library import starting_library, summary

        config = self.config.library
        inputs = {"parent": self.parent_key, "tokens": self.tokens_step.key, "space": self._space_key}
        start = starting_library(config, self.space, self.parent_key)
        if start:
            config = config.model_copy(update={"start_from": start.artifact.url})  # every node finds it there
            inputs["start"] = start.artifact.key

        def work(step: Artifact) -> None:
            from actors.library_stream import build_library

            build_library(
                self.parent,
                self.space,
                config,
                self.config.cluster,
                self.tokens[0],
                self.config.seed,
                step,
                self.progress,
            )

        # what has no part in the result, or stands among the inputs
        elsewhere = {"window", "checkpoint_every", "max_pairs", "narrow_from", "start_from"}
        settings = config.model_dump(mode="json", exclude=elsewhere)
        step = self._stage(self.store.artifact("library", settings | {"seed": self.config.seed}, inputs), work)
        print(f"  {summary(step.facts())}", file=sys.stderr, flush=True)
        return step

    @cached_property
    def profile_config(self) -> ProfileConfig:
        """How to profile, with numbers in place of `auto`."""
        from puzzle_ray.profiling.batch_sizes import with_batch_sizes

        return with_batch_sizes(self.config.profile, self.model_config, self._whole_space, self.config.search.limits.memory_mib)

    @cached_property
    def profile_step(self) -> Artifact:
        """Of the whole space: a narrowed one is part of it, so what was measured for the run before counts here."""

        def work(step: Artifact) -> None:
            from actors.profiler import profile_blocks

            profile_blocks(self.parent, self._whole_space, self.profile_config, self.config.cluster, step, self.progress)

        from actors.remote_work import node_cpus
        from puzzle_ray.profiling.engine import engine_of

        profile = self.profile_config
        engine = engine_of(profile)
        cpus = node_cpus(profile.resources, profile.label_selector)
        target = "the GPU that is asked for" if profile.num_gpus else f"{engine.device_name()}; {cpus} CPUs"
        inputs = {
            "parent": self.parent_key,
            "space": to_json(self._whole_space).decode(),
            "engine": engine.version(),
            "target": target,
        }
        settings = profile.model_dump(mode="json", exclude={"num_profilers"})
        return self._stage(self.store.artifact("profile", settings, inputs), work)

    @cached_property
    def profile(self) -> Profile:
        from puzzle_ray.profiling.measure import PROFILE_TABLE

        profile = Profile.from_parquet(self.profile_step.read(PROFILE_TABLE))
        if profile.estimated:
            print(f"  costs are ESTIMATED by {profile.engine} for {profile.device}, not measured", file=sys.stderr, flush=True)
        return profile

    @cached_property
    def scores_step(self) -> Artifact:
        library = self.library

        def work(step: Artifact) -> None:
            from actors.scoring_pool import score_blocks

            score_blocks(
                self.parent, self.space, library, self.config.scoring, self.config.cluster, self.tokens[1], step, self.progress
            )

        inputs = {"library": library.key, "tokens": self.tokens_step.key}
        if self.config.scoring.downstream is not None:
            inputs["downstream"] = source_fingerprint(self.config.scoring.downstream)
        settings = self.config.scoring.model_dump(mode="json", exclude={"shortlist_settle"})
        return self._stage(self.store.artifact("scores", {"scoring": settings}, inputs), work)

    @cached_property
    def scores(self) -> Scores:
        from puzzle_ray.scoring.shard import PROFILE_TABLE

        return Scores.from_parquet(self.scores_step.read(PROFILE_TABLE))

    # search, child

    @cached_property
    def architecture_step(self) -> Artifact:
        profile_step = self.profile_step  # fails first where the target cannot be profiled
        scores_step = self.scores_step
        search = self.config.search

        def work(step: Artifact) -> None:
            from puzzle_ray.search.pick import PICKED, answers, pick_as_configured
            from puzzle_ray.search.setup import solve

            setup = self.sweep_setup
            scores = self.settled(self.scores, lambda seen: answers(replace(setup, scores=seen), search))
            setup = replace(setup, scores=scores)
            if search.measures:
                with self.measuring() as measure:
                    architecture, report = pick_as_configured(setup, search, measure)
                step.write_json(PICKED, report)
                if self._how_scored["settle"]:  # local search may have taken what is only estimated
                    scores = self.settled(scores, lambda _: [architecture.choices])
                    total = math.fsum(scores.value(i, c, architecture.metric) for i, c in enumerate(architecture.choices))
                    architecture = replace(architecture, objective=total, bound=min(architecture.bound, total))
            else:
                architecture = solve(setup, search.limits)
            step.write(SCORES, scores.to_parquet())
            step.write(ARCHITECTURE, to_json(architecture))
            step.finish({"objective": architecture.objective, "bound": architecture.bound, "status": architecture.status})

        inputs = {"scores": scores_step.key, "profile": profile_step.key}
        settings = search.model_dump(mode="json", exclude={"sweep", "sweep_measure", "sweep_gkd"}) | self._how_scored
        return self._stage(self.store.artifact("architecture", settings, inputs), work)

    @property
    def _how_scored(self) -> dict[str, Any]:
        """What a search's result depends on besides its own settings."""
        scoring = self.config.scoring
        settle = scoring.shortlist != "none" and scoring.shortlist_settle
        return {"metric": scoring.metric, "settle": settle, "seed": self.config.seed}

    def settled(self, scores: Scores, answers: Callable[[Scores], Iterable[Sequence[LayerChoice]]]) -> Scores:
        """The scores, made exact for all that these answers use; what is scored for that is kept for all budgets."""
        scoring = self.config.scoring
        if not self._how_scored["settle"]:
            return scores
        from actors.scoring_pool import scoring as exact_scoring
        from puzzle_ray.scoring.settle import settle

        step = self.store.artifact("settled", {}, {"scores": self.scores_step.key})
        numbers = (self.parent, self.space, self.library, scoring, self.config.cluster, self.tokens[1], step, self.progress)
        with exact_scoring(*numbers) as score:
            return settle(scores, scoring.metric, answers, score)

    def measuring(self) -> Any:
        """A context with a function that measures whole children on held-out text; what it found is kept for all budgets."""
        from actors.pick_pool import measuring

        sequences = self.config.scoring.micro_batch_tokens // self.config.data.sequence_length
        tokens = self.config.search.measure_tokens
        batches = [batch.numpy() for batch in self.tokens[1].first(tokens, max(1, sequences))]
        inputs = {"library": self.library.key, "tokens": self.tokens_step.key}
        step = self.store.artifact("measured", {"tokens": tokens, "sequences": sequences}, inputs)
        return measuring(self.parent, self.library, batches, self.config.cluster, step, self.progress)

    @cached_property
    def sweep_setup(self) -> Any:
        """A `SweepSetup` of this run's own scenario."""
        from puzzle_ray.search.setup import SearchSetup

        config, search = self.config, self.config.search
        numbers = (self.space, self.scores, self.profile, self.profile_config.scenario, config.scoring.metric)
        return SearchSetup(*numbers, search.searcher, search.time_limit_s, search.limits, config.seed)

    @cached_property
    def searched_scores(self) -> Scores:
        """What the architecture was searched by: exact for all that it is made of."""
        return Scores.from_parquet(self.architecture_step.read(SCORES))

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture.from_json(self.architecture_step.read(ARCHITECTURE))

    def in_context(self, input_tokens: float, output_tokens: float) -> Run:
        """The same run with sequences of another length in its profile, at the same batch sizes."""
        profile = self.profile_config
        scenario = replace(profile.scenario, input_tokens=input_tokens, output_tokens=output_tokens)
        if scenario == profile.scenario:
            return self
        profile = profile.model_copy(update={"scenario": scenario})
        return Run(self.config.model_copy(update={"profile": profile}), self.progress)

    @cached_property
    def sweep(self) -> Artifact:
        from puzzle_ray.search.sweep import Grid, contexts_of, finish, gathered, points_of, with_distilled, with_measured

        search = self.config.search
        runs = {c: self.in_context(*c) for c in contexts_of(search.grid, self.profile_config.scenario)}
        profiles = {f"profile {c[0]}+{c[1]}": run.profile_step.key for c, run in runs.items()}

        def work(step: Artifact) -> None:
            from actors.placement import cluster_cpus
            from actors.sweep import sweep

            points = points_of(search.grid)
            grid = Grid({c: run.sweep_setup for c, run in runs.items()})
            grid = grid.with_scores(self.settled(self.scores, lambda seen: grid.with_scores(seen).answers(points)))
            sweep(grid, points, step, cluster_cpus())
            found = gathered(points, step)
            if search.sweep_measure:
                with self.measuring() as measure:
                    found = with_measured(found, measure)
            if search.sweep_gkd:
                found = with_distilled(found, lambda choices: self.heldout_of(self.distilled_of(self.child_of(choices))))
            finish(found, step)

        whole = dict.fromkeys(("searcher", "time_limit_s", "sweep", "sweep_measure", "measure_tokens"), True)
        settings = search.model_dump(mode="json", include=whole | {"limits": {"fixed", "agree"}})
        settings |= self._how_scored
        if search.sweep_gkd:
            settings |= self._settings("gkd", "evaluate")
        return self._stage(self.store.artifact("sweep", settings, {"scores": self.scores_step.key} | profiles), work)

    @cached_property
    def child(self) -> Artifact:
        """The child as assembled from the library."""
        self.architecture_step  # noqa: B018  (shown before the child)
        return self.child_of(self.architecture.choices)

    def child_of(self, choices: Sequence[LayerChoice]) -> Artifact:
        """A child of any choices in the search space."""
        library = self.library

        def work(step: Artifact) -> None:
            from actors.remote_work import realize, run_alone

            run_alone(realize, self.parent, choices, library, step, cluster=self.config.cluster, what="realize")

        inputs = {"library": library.key, "parent": self.parent_key, "choices": ", ".join(choice.label for choice in choices)}
        return self._stage(self.store.artifact("child", {}, inputs), work)

    @cached_property
    def distilled(self) -> Artifact:
        """The child after global knowledge distillation."""
        return self.distilled_of(self.child)

    def distilled_of(self, child: Artifact) -> Artifact:
        """Any child after global knowledge distillation."""
        config = self.config.gkd

        def work(step: Artifact) -> None:
            from actors.gkd_worker import run_gkd
            from puzzle_ray.distill.gkd import GkdJob

            job = GkdJob(self.parent, child, self.tokens_step, step, config, self.config.seed)
            run_gkd(job, cluster=self.config.cluster, progress=self.progress)

        settings = config.model_dump(mode="json", exclude={"checkpoint_every", "max_failures"}) | {"seed": self.config.seed}
        return self._stage(self.store.artifact("gkd", settings, {"child": child.key, "tokens": self.tokens_step.key}), work)

    def heldout_of(self, distilled: Artifact) -> Mapping[str, float]:
        """Held-out loss, KL and agreement of a distilled child."""
        tokens = self.config.evaluate.tokens

        def work(step: Artifact) -> None:
            from actors.remote_work import predict, run_alone

            batches = [batch.numpy() for batch in self.tokens[1].first(tokens, 8)]
            folders = {"parent": self.parent, "child": distilled.path("child")}
            found = run_alone(predict, folders, batches, cluster=self.config.cluster, what="evaluate")
            step.finish(found["child"])

        inputs = {"child": distilled.key, "tokens": self.tokens_step.key}
        return self._stage(self.store.artifact("heldout", {"tokens": tokens}, inputs), work).facts()

    # evaluation, report

    @cached_property
    def evaluation_step(self) -> Artifact:
        distilled = self.distilled
        folders = {"parent": self.parent, "child_before_gkd": self.child.path("child"), "child": distilled.path("child")}

        def work(step: Artifact) -> None:
            with self.progress.stage("evaluate", 1, "comparison") as bar:
                found = self.compare(folders)
                bar.advance()
            step.write_json(EVALUATION, found)
            step.finish({"measured_speedup": found["measured_speedup"], "predicted_speedup": found["predicted_speedup"]})

        settings = self._settings("evaluate") | {"profile": self.profile_config.model_dump(mode="json")}
        inputs = {"child": distilled.key, "tokens": self.tokens_step.key, "architecture": self.architecture_step.key}
        if self.config.scoring.downstream is not None:
            settings["downstream_questions"] = self.config.scoring.downstream_questions
            inputs["downstream"] = source_fingerprint(self.config.scoring.downstream)
        return self._stage(self.store.artifact("evaluation", settings, inputs), work)

    def compare(self, folders: Mapping[str, str]) -> dict[str, Any]:
        """Held-out predictions and measured speed of models by name, `parent` and `child` among them, side by side; their answers to
        the half of the downstream questions that no block was scored by."""
        from actors.remote_work import evaluate, run_alone
        from puzzle_ray.scoring.downstream import load_questions

        profile = self.profile_config
        batches = [batch.numpy() for batch in self.tokens[1].first(self.config.evaluate.tokens, 8)]
        found: dict[str, Any] = run_alone(
            evaluate,
            folders,
            batches,
            self.architecture,
            profile.scenario,
            self.config.evaluate,
            profile.dtype,
            profile.num_gpus > 0,
            load_questions(self.parent, self.config.scoring, getattr(self.model_config, "max_position_embeddings", None), "test"),
            cluster=self.config.cluster,
            what="evaluate",
            profile=profile,
        )
        return found

    @cached_property
    def evaluation(self) -> Mapping[str, Any]:
        return dict(self.evaluation_step.read_json(EVALUATION))

    @cached_property
    def report(self) -> Artifact:
        from jobs.report_run import report_data
        from puzzle_ray.report.page import render

        inputs = {"evaluation": self.evaluation_step.key, "sweep": self.sweep.key, "architecture": self.architecture_step.key}

        def work(step: Artifact) -> None:
            step.write("index.html", render(report_data(self)).encode())
            step.finish({})

        return self._stage(self.store.artifact("report", {}, inputs), work)
