"""What a checkpoint says about sampling, for the fields that a request leaves out.

It stands in `generation_config.json`, or in `config.json` where that file is absent. It is read as vLLM reads it (`--generation-config
auto`): every value counts, whatever `do_sample` says, and what a request gives goes before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from puzzle_ray.errors import ConfigError
from puzzle_ray.serving.sampling import SamplingParams

FILES = ("generation_config.json", "config.json")  # the first that is there
_COUNTS = ("top_k", "max_new_tokens")
_NAMES = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", *_COUNTS)
# What changes the tokens of `generate()`, and neither this server nor vLLM applies. With the values that change nothing.
_UNUSED: Mapping[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (0,), "min_new_tokens": (0,), "typical_p": (1.0,), "top_h": (), "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,), "guidance_scale": (1.0,), "bad_words_ids": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "sequence_bias": ({}, []), "exponential_decay_length_penalty": (),
}  # fmt: skip


@dataclass(frozen=True)
class SamplingDefaults:
    """A model's own sampling. Without any, a request has OpenAI's defaults.

    values: by the names of SamplingParams.
    max_tokens: for chat alone, as far as there is room. Completions have OpenAI's default.
    unused: what the checkpoint says besides that would change tokens, and is not applied.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    max_tokens: int | None = None
    unused: tuple[str, ...] = ()

    def shown(self) -> dict[str, float]:
        """By the names in requests."""
        return {**self.values} | ({} if self.max_tokens is None else {"max_tokens": self.max_tokens})

    def __str__(self) -> str:
        words = [f"{name} {value}" for name, value in self.values.items()]
        return ", ".join([*words, *([] if self.max_tokens is None else [f"max_tokens {self.max_tokens} in chat"])])


def sampling_defaults(said: Mapping[str, Any], file: str) -> SamplingDefaults:
    """The sampling in the content of `file`. Raises ConfigError for a value that no request could have."""
    values = {name: _number(name, said[name], file) for name in _NAMES if said.get(name) is not None}
    if values.get("top_k") == -1:  # vLLM's word for all tokens
        values["top_k"] = 0
    limit = values.pop("max_new_tokens", None)
    if limit is not None and limit < 1:
        raise _refused("max_new_tokens", f"is {limit}", file, "give at least 1")
    params: dict[str, Any] = dict(values)
    try:
        SamplingParams(**params)
    except ConfigError as error:
        raise _refused(error.args[0], error.args[1], file, error.args[2]) from None
    unused = tuple(name for name, neutral in _UNUSED.items() if said.get(name) is not None and said[name] not in neutral)
    return SamplingDefaults(values, None if limit is None else int(limit), unused)


def _number(name: str, value: Any, file: str) -> float:
    is_count = name in _COUNTS
    if isinstance(value, bool) or not isinstance(value, int if is_count else (int, float)):
        raise _refused(name, f"is {value!r}", file, "write a whole number" if is_count else "write a number")
    try:
        number = float(value)
    except OverflowError:
        raise _refused(name, "is out of range", file, "write a smaller number") from None
    return int(value) if is_count else number


def _refused(name: str, problem: str, file: str, remedy: str) -> ConfigError:
    return ConfigError(f"generation_config.{name}", f"{problem} in {file}", f"{remedy}, or serve with generation_config none")
