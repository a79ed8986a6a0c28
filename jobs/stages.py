"""The stages of a run, each computed when first asked for, kept in the store, and skipped when it is there already."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.checks import check
from puzzle_ray.artifacts import Architecture, LayerChoice, Profile, Scores, SearchSpace, to_json
from puzzle_ray.config import TINY, RunConfig
from puzzle_ray.data import Tokens, source_fingerprint, tokenise
from puzzle_ray.progress import Lines, Progress
from puzzle_ray.store import Step, Store

TOKENS = "tokens.safetensors"
ARCHITECTURE = "architecture.json"
EVALUATION = "evaluation.json"


class Run:
    """One config and where its artifacts are. Asking for a stage does it, and first all it depends on."""

    def __init__(self, config: RunConfig, progress: Progress | None = None) -> None:
        self.config = config
        self.progress = progress or Lines()
        self.store = Store(config.store)
        self.seconds: dict[str, float] = {}

    def check(self) -> None:
        """Raises a PuzzleError for what can be known to be wrong before work starts."""
        check(self.config, self.store)

    def _stage(self, step: Step, work: Callable[[Step], None]) -> Step:
        """Does `work` unless the step is finished, and says in one line where the result is."""
        started = time.monotonic()
        done = step.finished
        if not done:
            work(step)
            self.seconds[step.stage] = time.monotonic() - started
            step.write_json("seconds.json", self.seconds[step.stage])
        elif step.exists("seconds.json"):
            self.seconds[step.stage] = float(step.read_json("seconds.json"))
        took = "already there" if done else f"{time.monotonic() - started:.1f} s"
        print(f"[{step.stage}] {took}: {step.url}", file=sys.stderr, flush=True)
        return step

    def _settings(self, *sections: str) -> dict[str, Any]:
        return {name: getattr(self.config, name).model_dump(mode="json") for name in sections}

    # parent, text, search space

    @cached_property
    def _tiny_parent_step(self) -> Step:
        from puzzle_ray.tiny_parent import TinyParentSpec, build_tiny_parent, source_fingerprint

        spec = TinyParentSpec(seed=self.config.seed)

        def work(step: Step) -> None:
            with step.folder_to_publish("parent") as folder:
                summary = build_tiny_parent(folder, spec, self.progress)
            step.finish(asdict(summary))

        step = self._stage(self.store.step("tiny_parent", {"fingerprint": source_fingerprint(spec)}, {}), work)
        facts = step.facts()
        print(
            f"  tiny parent: {facts['num_parameters'] / 1e6:.2f}M parameters, held-out loss {facts['heldout_loss']:.3f} nats a token "
            f"(unigram entropy {facts['unigram_entropy']:.3f})",
            file=sys.stderr,
            flush=True,
        )
        return step

    @cached_property
    def parent(self) -> str:
        """The parent as every node can find it: a folder, a URL, or a hub id with the commit this run is about."""
        from puzzle_ray.checkpoint import locate

        if self.config.parent == TINY:
            return f"{self._tiny_parent_step.path('parent')}/model"
        if Path(self.config.parent).expanduser().is_dir():
            return str(Path(self.config.parent).expanduser().absolute())
        if "://" in self.config.parent:
            return self.config.parent
        commit = locate(self.config.parent, self.config.revision).name  # the hub's cache names a snapshot's folder by its commit
        return f"{self.config.parent}@{commit}"

    @cached_property
    def _parent_folder(self) -> Path:
        """On this machine."""
        from puzzle_ray.checkpoint import locate

        return locate(self.parent)

    @cached_property
    def parent_key(self) -> str:
        from puzzle_ray.checkpoint import fingerprint

        return fingerprint(self._parent_folder)

    @cached_property
    def model_config(self) -> Any:
        from puzzle_ray.checkpoint import read_config

        return read_config(self._parent_folder)

    @cached_property
    def tokens_step(self) -> Step:
        data = self.config.data
        if self.config.parent == TINY and data.train is None:
            folder = self._tiny_parent_step.local_folder("parent")
            data = data.model_copy(update={"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl")})
        sources = {name: source_fingerprint(s) for name, s in (("train", data.train), ("heldout", data.heldout)) if s}

        def work(step: Step) -> None:
            import torch
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self._parent_folder)
            train, heldout = tokenise(data, tokenizer, getattr(self.model_config, "max_position_embeddings", None))
            step.write_tensors(
                TOKENS, {"train": torch.from_numpy(train.sequences), "heldout": torch.from_numpy(heldout.sequences)}
            )
            step.finish({"train_tokens": train.num_tokens, "heldout_tokens": heldout.num_tokens})

        settings = data.model_dump(mode="json", exclude={"train", "heldout"})
        return self._stage(self.store.step("tokens", settings, {"parent": self.parent_key, **sources}), work)

    @cached_property
    def tokens(self) -> tuple[Tokens, Tokens]:
        """(train, held-out)."""
        tensors, _ = self.tokens_step.read_tensors(TOKENS)
        return Tokens(tensors["train"].numpy()), Tokens(tensors["heldout"].numpy())

    def _space_of(self, model_config: Any) -> SearchSpace:
        from puzzle_ray.blocks import search_space

        space = self.config.space
        return search_space(model_config, space.attention, space.ffn, space.ffn_multiple_of)

    @cached_property
    def space(self) -> SearchSpace:
        return self._space_of(self.model_config)

    @cached_property
    def _space_key(self) -> str:
        return to_json(self.space).decode()

    # library, profile, scores

    @cached_property
    def library(self) -> Step:
        def work(step: Step) -> None:
            from actors.library_stream import build_library

            build_library(
                self.parent,
                self.space,
                self.config.library,
                self.config.cluster,
                self.tokens[0],
                self.config.seed,
                step,
                self.progress,
            )

        settings = self.config.library.model_dump(mode="json", exclude={"window", "checkpoint_every"})
        inputs = {"parent": self.parent_key, "tokens": self.tokens_step.key, "space": self._space_key}
        return self._stage(self.store.step("library", settings | {"seed": self.config.seed}, inputs), work)

    @cached_property
    def profile_step(self) -> Step:
        def work(step: Step) -> None:
            from actors.profiler import profile_blocks

            profile_blocks(self.parent, self.space, self.config.profile, self.config.cluster, step, self.progress)

        from actors.remote_work import node_cpus
        from puzzle_ray.profiling.measure import find_engine

        profile = self.config.profile
        engine = find_engine(profile.engine)
        cpus = node_cpus(profile.resources, profile.label_selector)
        target = "the GPU that is asked for" if profile.num_gpus else f"{engine.device_name()}; {cpus} CPUs"
        inputs = {"parent": self.parent_key, "space": self._space_key, "engine": engine.version(), "target": target}
        settings = profile.model_dump(mode="json", exclude={"num_profilers"})
        return self._stage(self.store.step("profile", settings, inputs), work)

    @cached_property
    def profile(self) -> Profile:
        from puzzle_ray.profiling.measure import TABLE

        return Profile.from_parquet(self.profile_step.read(TABLE))

    @cached_property
    def scores_step(self) -> Step:
        library = self.library

        def work(step: Step) -> None:
            from actors.scoring_pool import score_blocks

            score_blocks(
                self.parent, self.space, library, self.config.scoring, self.config.cluster, self.tokens[1], step, self.progress
            )

        inputs = {"library": library.key, "tokens": self.tokens_step.key}
        if self.config.scoring.downstream is not None:
            inputs["downstream"] = source_fingerprint(self.config.scoring.downstream)
        return self._stage(self.store.step("scores", self._settings("scoring"), inputs), work)

    @cached_property
    def scores(self) -> Scores:
        from puzzle_ray.scoring.replace_one import TABLE

        return Scores.from_parquet(self.scores_step.read(TABLE))

    # search, child

    @cached_property
    def architecture_step(self) -> Step:
        profile_step = self.profile_step  # fails first where the target cannot be profiled
        scores_step = self.scores_step
        search = self.config.search

        def work(step: Step) -> None:
            from puzzle_ray.pick import PICKED, pick_as_told
            from puzzle_ray.sweep import solve

            if search.measures:
                with self.measuring() as measure:
                    architecture, report = pick_as_told(self.sweep_setup, search, measure)
                step.write_json(PICKED, report)
            else:
                architecture = solve(self.sweep_setup, search.limits)
            step.write(ARCHITECTURE, to_json(architecture))
            step.finish({"objective": architecture.objective, "bound": architecture.bound, "status": architecture.status})

        inputs = {"scores": scores_step.key, "profile": profile_step.key}
        settings = search.model_dump(mode="json", exclude={"sweep", "sweep_measure"}) | {"metric": self.config.scoring.metric}
        return self._stage(self.store.step("architecture", settings | {"seed": self.config.seed}, inputs), work)

    def measuring(self) -> Any:
        """A context with a function that measures whole children on held-out text; what it found is kept for all budgets."""
        from actors.pick_pool import measuring

        sequences = self.config.scoring.micro_batch_tokens // self.config.data.sequence_length
        tokens = self.config.search.measure_tokens
        batches = [batch.numpy() for batch in self.tokens[1].first(tokens, max(1, sequences))]
        inputs = {"library": self.library.key, "tokens": self.tokens_step.key}
        step = self.store.step("measured", {"tokens": tokens, "sequences": sequences}, inputs)
        return measuring(self.parent, self.library, batches, self.config.cluster, step, self.progress)

    @cached_property
    def sweep_setup(self) -> Any:
        """A `SweepSetup` of this run's own scenario."""
        from puzzle_ray.sweep import SweepSetup

        config, search = self.config, self.config.search
        numbers = (self.space, self.scores, self.profile, config.profile.scenario, config.scoring.metric)
        return SweepSetup(*numbers, search.searcher, search.time_limit_s, search.limits, config.seed)

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture.from_json(self.architecture_step.read(ARCHITECTURE))

    def in_context(self, input_tokens: int, output_tokens: int) -> Run:
        """The same run with sequences of another length in its profile."""
        profile = self.config.profile
        scenario = replace(profile.scenario, input_tokens=input_tokens, output_tokens=output_tokens)
        if scenario == profile.scenario:
            return self
        profile = profile.model_copy(update={"scenario": scenario})
        return Run(self.config.model_copy(update={"profile": profile}), self.progress)

    @cached_property
    def sweep(self) -> Step:
        from puzzle_ray.sweep import Grid, contexts_of, finish, gathered, points_of, with_distilled, with_measured

        search = self.config.search
        runs = {c: self.in_context(*c) for c in contexts_of(search.grid, self.config.profile.scenario)}
        profiles = {f"profile {c[0]}+{c[1]}": run.profile_step.key for c, run in runs.items()}

        def work(step: Step) -> None:
            from actors.placement import cluster_cpus
            from actors.sweep import sweep

            points = points_of(search.grid)
            sweep(Grid({c: run.sweep_setup for c, run in runs.items()}), points, step, cluster_cpus())
            found = gathered(points, step)
            if search.sweep_measure:
                with self.measuring() as measure:
                    found = with_measured(found, measure)
            if search.sweep_gkd:
                found = with_distilled(found, lambda choices: self.heldout_of(self.distilled_of(self.child_of(choices))))
            finish(found, step)

        whole = dict.fromkeys(("searcher", "time_limit_s", "sweep", "sweep_measure", "measure_tokens"), True)
        settings = search.model_dump(mode="json", include=whole | {"limits": {"fixed", "agree"}})
        settings |= {"metric": self.config.scoring.metric, "seed": self.config.seed}
        if search.sweep_gkd:
            settings |= self._settings("gkd", "evaluate")
        return self._stage(self.store.step("sweep", settings, {"scores": self.scores_step.key} | profiles), work)

    @cached_property
    def child(self) -> Step:
        """The child as assembled from the library."""
        self.architecture_step  # noqa: B018  (shown before the child)
        return self.child_of(self.architecture.choices)

    def child_of(self, choices: Sequence[LayerChoice]) -> Step:
        """A child of any choices in the search space."""
        library = self.library

        def work(step: Step) -> None:
            from actors.remote_work import realize, run_alone

            run_alone(realize, self.parent, choices, library, step, cluster=self.config.cluster, what="realize")

        inputs = {"library": library.key, "parent": self.parent_key, "choices": ", ".join(choice.label for choice in choices)}
        return self._stage(self.store.step("child", {}, inputs), work)

    @cached_property
    def distilled(self) -> Step:
        """The child after global knowledge distillation."""
        return self.distilled_of(self.child)

    def distilled_of(self, child: Step) -> Step:
        """Any child after global knowledge distillation."""
        config = self.config.gkd

        def work(step: Step) -> None:
            from actors.gkd_worker import run_gkd
            from puzzle_ray.distill.gkd import GkdJob

            job = GkdJob(self.parent, child, self.tokens_step, step, config, self.config.seed)
            run_gkd(job, cluster=self.config.cluster, progress=self.progress)

        settings = config.model_dump(mode="json", exclude={"checkpoint_every", "max_failures"}) | {"seed": self.config.seed}
        return self._stage(self.store.step("gkd", settings, {"child": child.key, "tokens": self.tokens_step.key}), work)

    def heldout_of(self, distilled: Step) -> Mapping[str, float]:
        """Held-out loss, KL and agreement of a distilled child."""
        tokens = self.config.evaluate.tokens

        def work(step: Step) -> None:
            from actors.remote_work import predict, run_alone

            batches = [batch.numpy() for batch in self.tokens[1].first(tokens, 8)]
            folders = {"parent": self.parent, "child": distilled.path("child")}
            found = run_alone(predict, folders, batches, cluster=self.config.cluster, what="evaluate")
            step.finish(found["child"])

        inputs = {"child": distilled.key, "tokens": self.tokens_step.key}
        return self._stage(self.store.step("heldout", {"tokens": tokens}, inputs), work).facts()

    # evaluation, report

    @cached_property
    def evaluation_step(self) -> Step:
        distilled = self.distilled
        folders = {"parent": self.parent, "child_before_gkd": self.child.path("child"), "child": distilled.path("child")}

        def work(step: Step) -> None:
            with self.progress.stage("evaluate", 1, "comparison") as bar:
                found = self.compare(folders)
                bar.advance()
            step.write_json(EVALUATION, found)
            step.finish({"measured_speedup": found["measured_speedup"], "predicted_speedup": found["predicted_speedup"]})

        settings = self._settings("evaluate") | {"profile": self.config.profile.model_dump(mode="json")}
        inputs = {"child": distilled.key, "tokens": self.tokens_step.key}
        return self._stage(self.store.step("evaluation", settings, inputs), work)

    def compare(self, folders: Mapping[str, str]) -> dict[str, Any]:
        """Held-out predictions and measured speed of models by name, `parent` and `child` among them, side by side."""
        from actors.remote_work import evaluate, run_alone

        profile = self.config.profile
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
            cluster=self.config.cluster,
            what="evaluate",
            profile=profile,
        )
        return found

    @cached_property
    def evaluation(self) -> Mapping[str, Any]:
        return dict(self.evaluation_step.read_json(EVALUATION))

    @cached_property
    def report(self) -> Step:
        from jobs.report_run import report_data
        from puzzle_ray.report.page import render

        inputs = {"evaluation": self.evaluation_step.key, "sweep": self.sweep.key, "architecture": self.architecture_step.key}

        def work(step: Step) -> None:
            step.write("index.html", render(report_data(self)).encode())
            step.finish({})

        return self._stage(self.store.step("report", {}, inputs), work)
