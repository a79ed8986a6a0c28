"""The stages of a run, each computed when first asked for, kept in the store, and skipped when it is there already."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from puzzle_ray.artifacts import Architecture, LayerChoice, Profile, Scores, SearchSpace, to_json
from puzzle_ray.config import TINY, RunConfig
from puzzle_ray.data import Tokens, check_source, source_fingerprint, tokenise
from puzzle_ray.errors import ConfigError
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
        """Everything that can be known to be wrong before work starts. Raises a PuzzleError."""
        from puzzle_ray.checkpoint import locate, read_config
        from puzzle_ray.families import describe

        self.store.check()
        for where, source in (("data.train", self.config.data.train), ("data.heldout", self.config.data.heldout)):
            if source is not None:
                check_source(source, where)
        if self.config.parent != TINY:
            if self.config.data.train is None:
                raise ConfigError("data.train", "no training text is named", "give --data, or use parent: tiny")
            config = read_config(locate(self.config.parent, self.config.revision))
            describe(config)
            self._space_of(config)
            needed = max(self.config.data.sequence_length, self.config.profile.scenario.tokens_per_sequence)
            positions = getattr(config, "max_position_embeddings", None)
            if positions is not None and needed > positions:
                raise ConfigError(
                    "parent",
                    f"sequences of {needed} tokens do not fit its {positions} positions",
                    "shorten data.sequence_length or profile.scenario",
                )

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
    def _tiny_parent(self) -> Path:
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
        return step.local_folder("parent")

    @cached_property
    def parent(self) -> str:
        """The parent's folder."""
        from puzzle_ray.checkpoint import locate

        if self.config.parent == TINY:
            return str(self._tiny_parent / "model")
        return str(locate(self.config.parent, self.config.revision).absolute())

    @cached_property
    def parent_key(self) -> str:
        from puzzle_ray.checkpoint import fingerprint

        return fingerprint(Path(self.parent))

    @cached_property
    def model_config(self) -> Any:
        from puzzle_ray.checkpoint import read_config

        return read_config(Path(self.parent))

    @cached_property
    def tokens_step(self) -> Step:
        data = self.config.data
        if self.config.parent == TINY and data.train is None:
            folder = self._tiny_parent
            data = data.model_copy(update={"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl")})
        sources = {name: source_fingerprint(s) for name, s in (("train", data.train), ("heldout", data.heldout)) if s}

        def work(step: Step) -> None:
            import torch
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.parent)
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

        inputs = {"parent": self.parent_key, "space": self._space_key}
        return self._stage(self.store.step("profile", self._settings("profile"), inputs), work)

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

        def work(step: Step) -> None:
            from puzzle_ray.sweep import solve

            architecture = solve(self.sweep_setup, self.config.search.limits)
            step.write(ARCHITECTURE, to_json(architecture))
            step.finish({"objective": architecture.objective, "bound": architecture.bound, "status": architecture.status})

        inputs = {"scores": scores_step.key, "profile": profile_step.key}
        settings = self.config.search.model_dump(mode="json", exclude={"sweep_speedups"}) | {"metric": self.config.scoring.metric}
        return self._stage(self.store.step("architecture", settings, inputs), work)

    @cached_property
    def sweep_setup(self) -> Any:
        from puzzle_ray.sweep import SweepSetup

        search = self.config.search
        return SweepSetup(
            self.space,
            self.scores,
            self.profile,
            self.config.profile.scenario,
            self.config.scoring.metric,
            search.searcher,
            search.time_limit_s,
        )

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture.from_json(self.architecture_step.read(ARCHITECTURE))

    @cached_property
    def sweep(self) -> Step:
        inputs = {"scores": self.scores_step.key, "profile": self.profile_step.key}

        def work(step: Step) -> None:
            from actors.placement import cluster_cpus
            from actors.sweep import sweep
            from puzzle_ray.sweep import finish

            speedups = self.config.search.sweep_speedups
            sweep(self.sweep_setup, speedups, step, cluster_cpus())
            finish(speedups, step)

        settings = self.config.search.model_dump(mode="json", exclude={"limits"}) | {"metric": self.config.scoring.metric}
        return self._stage(self.store.step("sweep", settings, inputs), work)

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
            cluster=self.config.cluster,
            what="evaluate",
            num_gpus=profile.num_gpus,
            resources=profile.resources,
            label_selector=profile.label_selector,
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
