"""What a run starts from: its config and store, the parent, the text in tokens, the search space."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.checks import check
from puzzle_ray.artifacts import SearchSpace, to_json
from puzzle_ray.config import TINY, RunConfig
from puzzle_ray.data.order import Tokens
from puzzle_ray.data.sources import source_fingerprint
from puzzle_ray.data.tokenising import tokenise
from puzzle_ray.progress import Lines, Progress
from puzzle_ray.store import Artifact, Store

TOKENS = "tokens.safetensors"


class Inputs:
    """One config, where its artifacts are, and what all stages start from. Asking for something does it, and first all it depends on."""

    def __init__(self, config: RunConfig, progress: Progress | None = None) -> None:
        self.config = config
        self.progress = progress or Lines()
        self.store = Store(config.store)
        self.seconds: dict[str, float] = {}

    def check(self) -> None:
        """Raises a PuzzleError for what can be known to be wrong before work starts."""
        check(self.config, self.store)

    def _stage(self, step: Artifact, work: Callable[[Artifact], None]) -> Artifact:
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
    def _tiny_parent_step(self) -> Artifact:
        from puzzle_ray.recipes.tiny_parent import TinyParentSpec, build_tiny_parent, source_fingerprint

        spec = TinyParentSpec(seed=self.config.seed, steps=self.config.tiny_parent_steps)

        def work(step: Artifact) -> None:
            with step.folder_to_publish("parent") as folder:
                summary = build_tiny_parent(folder, spec, self.progress)
            step.finish(asdict(summary))

        step = self._stage(self.store.artifact("tiny_parent", {"fingerprint": source_fingerprint(spec)}, {}), work)
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
        from puzzle_ray.models.checkpoint import locate

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
        from puzzle_ray.models.checkpoint import locate

        return locate(self.parent)

    @cached_property
    def parent_key(self) -> str:
        from puzzle_ray.models.checkpoint import fingerprint

        return fingerprint(self._parent_folder)

    @cached_property
    def model_config(self) -> Any:
        from puzzle_ray.models.child import read_config

        return read_config(self._parent_folder)

    @cached_property
    def tokens_step(self) -> Artifact:
        data = self.config.data
        if self.config.parent == TINY and data.train is None:
            folder = self._tiny_parent_step.local_folder("parent")
            data = data.model_copy(update={"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl")})
        sources = {name: source_fingerprint(s) for name, s in (("train", data.train), ("heldout", data.heldout)) if s}

        def work(step: Artifact) -> None:
            import torch
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self._parent_folder)
            train, heldout = tokenise(data, tokenizer, getattr(self.model_config, "max_position_embeddings", None))
            step.write_tensors(
                TOKENS, {"train": torch.from_numpy(train.sequences), "heldout": torch.from_numpy(heldout.sequences)}
            )
            step.finish({"train_tokens": train.num_tokens, "heldout_tokens": heldout.num_tokens})

        settings = data.model_dump(mode="json", exclude={"train", "heldout"})
        return self._stage(self.store.artifact("tokens", settings, {"parent": self.parent_key, **sources}), work)

    @cached_property
    def tokens(self) -> tuple[Tokens, Tokens]:
        """(train, held-out)."""
        tensors, _ = self.tokens_step.read_tensors(TOKENS)
        return Tokens(tensors["train"].numpy()), Tokens(tensors["heldout"].numpy())

    def _space_of(self, model_config: Any) -> SearchSpace:
        from puzzle_ray.variants.space import search_space

        space = self.config.space
        return search_space(model_config, space.attention, space.ffn, space.ffn_multiple_of)

    @cached_property
    def _whole_space(self) -> SearchSpace:
        return self._space_of(self.model_config)

    @cached_property
    def space(self) -> SearchSpace:
        """What is trained, scored and searched."""
        from puzzle_ray.search.narrow import library_space

        return library_space(self._whole_space, self.config.library)

    @cached_property
    def _space_key(self) -> str:
        return to_json(self.space).decode()
