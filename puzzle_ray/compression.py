"""What all stages of a compression start from, and what one round of it hands on to the next."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch

from puzzle_ray.artifacts import Choices, SearchSpace
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.config import TINY, RunConfig
from puzzle_ray.data.packing import masked_by
from puzzle_ray.data.sources import source_fingerprint
from puzzle_ray.errors import ConfigError
from puzzle_ray.export.target import configured_space
from puzzle_ray.models.blocks import LayerStack, load_stack
from puzzle_ray.models.checkpoint import fingerprint, locate
from puzzle_ray.models.child import read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.models.tokenizer import read_tokenizer
from puzzle_ray.process import compute_with
from puzzle_ray.profiling.batch_sizes import with_batch_sizes
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Progress
from puzzle_ray.recipes import tiny_parent
from puzzle_ray.search.narrow import library_space
from puzzle_ray.store import Artifact, Store, do_once


def told(artifact: Artifact, said: Callable[[Mapping[str, Any]], str]) -> Artifact:
    """A finished artifact, of which one line is said: `said` of its facts, nothing where that is empty."""
    if words := said(artifact.facts()):
        print(f"  {words}", file=sys.stderr, flush=True)
    return artifact


def assignment(name: str, value: Any) -> str:
    """As a command line has it. Raises ConfigError for a value that no config file could hold."""

    def plain(found: Any) -> Any:
        if isinstance(found, PathLike):
            return fspath(found)
        problem = f"{found!r} is a {type(found).__name__}"
        raise ConfigError(name, problem, "give text, a path, a number, true or false, or a list or mapping of these")

    return f"{name}={json.dumps(value, default=plain)}"


@dataclass(frozen=True)
class Setting:
    """A config, its store, and what all stages start from."""

    config: RunConfig
    store: Store
    progress: Progress
    after: Round | None = None  # whose child is the parent here

    @property
    def number(self) -> int:
        """Which round it is, counted from 1."""
        return 1 if self.after is None else self.after.setting.number + 1

    @property
    def original(self) -> Setting:
        """The first round's."""
        return self if self.after is None else self.after.setting.original

    @cached_property
    def tiny_parent(self) -> Artifact:
        """The parent that recipe `tiny` trains."""
        spec = tiny_parent.TinyParentSpec(seed=self.config.seed, steps=self.config.tiny_parent_steps)
        artifact = self.store.artifact("tiny_parent", {"fingerprint": tiny_parent.source_fingerprint(spec)}, {})
        do_once(artifact, lambda artifact: tiny_parent.make_tiny_parent(artifact, spec, self.progress))
        return artifact

    @cached_property
    def parent(self) -> Path:
        """The parent's folder."""
        if self.after is not None:
            return locate(self.after.child.path("child"))
        if self.config.parent == TINY:
            return self.tiny_parent.local_folder("parent") / "model"
        return locate(self.config.parent, self.config.revision, self.config.trust_remote_code)

    @cached_property
    def parent_key(self) -> str:
        return fingerprint(self.parent)

    @cached_property
    def model_config(self) -> Any:
        return read_config(self.parent)

    @cached_property
    def separator(self) -> int | None:
        """The token that documents begin with, where attention does not cross them (`data.document_mask`)."""
        if not self.config.data.document_mask:
            return None
        return masked_by(read_tokenizer(self.original.parent, self.config.trust_remote_code))

    @property
    def max_positions(self) -> int | None:
        return getattr(self.model_config, "max_position_embeddings", None)

    @cached_property
    def whole_space(self) -> SearchSpace:
        space = self.config.space
        return configured_space(self.model_config, space, self.config.search.target_format)

    @cached_property
    def space(self) -> SearchSpace:
        """What is trained, scored and searched."""
        return library_space(self.whole_space, self.config.library)

    @cached_property
    def profile_config(self) -> ProfileConfig:
        """How to profile, with numbers in place of `auto`."""
        if self.after is not None:
            return self.original.profile_config
        limit_mib = self.config.search.limits.memory_mib
        return with_batch_sizes(self.config.profile, self.model_config, self.whole_space, limit_mib)

    @property
    def cluster(self) -> ClusterConfig:
        """What of the cluster's settings counts here, where no actor has a GPU."""
        return self.config.cluster.in_one_process()

    def stack(self) -> LayerStack:
        """The whole parent, cut into layers that can be exchanged, in the dtype that blocks are scored in."""
        compute_with(1)  # as every shard computes
        layers, dtype = self.model_config.num_hidden_layers, getattr(torch, self.config.scoring.dtype)
        return load_stack(self.parent, describe(self.model_config), self.model_config, 0, layers, dtype)


@dataclass(frozen=True)
class Round:
    """What a finished round hands on to the next one."""

    setting: Setting
    library: Artifact
    choices: Choices
    child: Artifact


def original_source(s: Setting) -> dict[str, str]:
    """The model that children are distilled towards and compared with, where that is not the parent."""
    return {"original": s.original.parent_key} if s.after else {}


def questions_source(s: Setting) -> dict[str, str]:
    questions = s.config.scoring.downstream
    return {} if questions is None else {"questions": source_fingerprint(questions)}
