"""Entries of `evaluate.tasks`: tasks of lm-evaluation-harness by name, and files of questions. Needs no lm_eval to tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePosixPath

from puzzle_ray.data.files import TextFile
from puzzle_ray.data.sources import source_fingerprint
from puzzle_ray.errors import ConfigError

WHERE = "evaluate.tasks"


def is_questions(entry: str) -> bool:
    """Whether it names a file of questions, and no task of lm_eval."""
    return TextFile(entry, entry).is_json_lines


def entry_name(entry: str) -> str:
    """A task's own name; a file's without its folder and ending."""
    return PurePosixPath(entry).name.partition(".jsonl")[0] if is_questions(entry) else entry


def task_sources(entries: Sequence[str]) -> dict[str, str]:
    """What the answers to tasks depend on besides models and settings: questions by their content, and the version of lm_eval."""
    if not entries:
        return {}
    questions = {f"questions {entry_name(e)}": source_fingerprint(e, WHERE) for e in entries if is_questions(e)}
    return questions | {"lm_eval": harness_version()}


def harness_version() -> str:
    """Raises ConfigError where lm-evaluation-harness is not installed."""
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        problem, remedy = "lm-evaluation-harness is not installed", "install the extra `eval`, or leave evaluate.tasks empty"
        raise ConfigError(WHERE, problem, remedy) from None
