"""Serving scenarios as a config writes them: by name, by lengths, or by a log of requests."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from puzzle_ray.artifacts import Lengths, Scenario
from puzzle_ray.plugins import did_you_mean

AUTO = "auto"
DEFAULT_SCENARIO = Scenario(batch_size=16, input_tokens=256, output_tokens=32)
NAMED_SCENARIOS: Mapping[str, tuple[int, int]] = {  # prompt and answer tokens
    "chat": (128, 128),
    "long_generation": (128, 1024),
    "reasoning": (128, 4096),  # inference-time compute: short questions, very long answers
    "rag": (2048, 128),  # retrieval or summaries: long prompts, short answers
    "long_context": (2048, 2048),
}
LENGTH_NAMES = ("input_tokens", "output_tokens")
KEYS = ("name", "batch_size", *LENGTH_NAMES, "lengths", "kv_tokens")
GROUPS = 8  # kinds of requests that a log is reduced to


def scenario_of(value: object) -> object:
    """A Scenario from what a config may hold. Any other value is returned as it is. Raises ValueError, which says what to write.

    A config may hold a name, or a mapping. The mapping has a `name`, or `input_tokens` and `output_tokens`, or `lengths`, and each may
    have a `batch_size`. `lengths` is a list of `{input_tokens, output_tokens, weight}`, or a file of requests (see `read_requests`), or
    `{file, groups}`.
    """
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        return value
    for key in value:
        if key not in KEYS:
            raise ValueError(f"{key!r} is not of a scenario; {did_you_mean(str(key), KEYS)}")
    given = {key: x for key, x in value.items() if x is not None and not (key == "lengths" and x in ([], ()))}
    if (
        "lengths" not in given and value.get("lengths") is not None and not {*LENGTH_NAMES} <= given.keys()
    ):  # a scenario that was written out has both
        raise ValueError("lengths is empty; write a list of {input_tokens: 128, output_tokens: 64, weight: 2}, or leave it out")
    if "name" in given and {"lengths", *LENGTH_NAMES} & given.keys():
        raise ValueError(f"a name stands for its lengths; write {{name: {given['name']}, batch_size: 16}} and nothing else")
    batch_size = _whole_number("batch_size", given.get("batch_size", DEFAULT_SCENARIO.batch_size))
    kv_tokens = _whole_number("kv_tokens", given["kv_tokens"]) if "kv_tokens" in given else None
    if "lengths" in given:
        return _scenario_of_lengths(given, batch_size, kv_tokens)
    prompt, answer = (
        _named_lengths(given["name"])
        if "name" in given
        else (_whole_number(n, given.get(n, getattr(DEFAULT_SCENARIO, n))) for n in LENGTH_NAMES)
    )
    return Scenario(batch_size, prompt, answer, kv_tokens=kv_tokens)


def _named_lengths(name: object) -> tuple[int, int]:
    if not isinstance(name, str) or name not in NAMED_SCENARIOS:
        raise ValueError(
            f"there is no scenario {name!r}; {did_you_mean(str(name), NAMED_SCENARIOS)}; or give input_tokens and output_tokens"
        )
    return NAMED_SCENARIOS[name]


def _scenario_of_lengths(given: Mapping[str, Any], batch_size: int, kv_tokens: int | None) -> Scenario:
    kinds, longest = _kinds(given["lengths"])
    weight = math.fsum(kind.weight for kind in kinds)
    means = [math.fsum(kind.weight * getattr(kind, name) for kind in kinds) / weight for name in LENGTH_NAMES]
    for name, mean in zip(LENGTH_NAMES, means, strict=True):
        if not math.isclose(given.get(name, mean), mean, rel_tol=1e-9):
            raise ValueError(f"{name}={given[name]} beside lengths, whose mean is {mean:g}; leave it out")
    held = max(kind.input_tokens + kind.output_tokens for kind in kinds)
    return Scenario(batch_size, means[0], means[1], kinds, kv_tokens or (longest if longest > held else None))


def _kinds(lengths: object) -> tuple[tuple[Lengths, ...], int]:
    """Distinct kinds of requests, and the tokens of the longest request."""
    if isinstance(lengths, str):
        lengths = {"file": lengths}
    if isinstance(lengths, Mapping):
        if "file" not in lengths or lengths.keys() - {"file", "groups"}:
            raise ValueError(f"lengths = {dict(lengths)}: write {{file: requests.csv, groups: {GROUPS}}}")
        requests = read_requests(str(lengths["file"]))
        return grouped_requests(requests, _whole_number("lengths.groups", lengths.get("groups", GROUPS))), max(map(sum, requests))
    if not isinstance(lengths, Sequence):
        raise ValueError(
            f"lengths = {lengths!r}: write a list of {{input_tokens: 128, output_tokens: 64, weight: 2}}, or a file's name"
        )
    kinds = tuple(x if isinstance(x, Lengths) else _kind(x) for x in lengths)
    return kinds, max(kind.input_tokens + kind.output_tokens for kind in kinds)


def _kind(raw: object) -> Lengths:
    if not isinstance(raw, Mapping) or raw.keys() - {*LENGTH_NAMES, "weight"} or not {*LENGTH_NAMES} <= raw.keys():
        raise ValueError(f"lengths has {raw!r}: write {{input_tokens: 128, output_tokens: 64, weight: 2}}")
    weight = raw.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"lengths has weight {weight!r}: write a number above 0")
    prompt, answer = (_whole_number(f"lengths.{name}", raw[name]) for name in LENGTH_NAMES)
    return Lengths(prompt, answer, float(weight))


def _whole_number(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer() or value < 1:
        more = " (or auto)" if name == "batch_size" else ""
        raise ValueError(f"{name} = {value!r}: write a whole number of at least 1{more}")
    return int(value)


def grouped_requests(requests: Sequence[tuple[int, int]], groups: int) -> tuple[Lengths, ...]:
    """Requests (input, output tokens) reduced to at most `groups` kinds.

    Requests are sorted by output tokens, then by input tokens, and cut into runs of about equal length. A kind has a run's rounded
    mean, and as its weight the number of requests.
    """
    ordered = sorted(requests, key=lambda request: (request[1], request[0]))
    count = min(groups, len(ordered))
    edges = [round(i * len(ordered) / count) for i in range(count + 1)]
    means = []
    for start, end in zip(edges, edges[1:], strict=False):
        run = ordered[start:end]
        means.append((*(max(1, round(sum(r[i] for r in run) / len(run))) for i in range(2)), len(run)))
    kinds = [(pair, sum(m[2] for m in same)) for pair, same in groupby(sorted(means), key=lambda m: m[:2])]
    return tuple(Lengths(pair[0], pair[1], float(weight)) for pair, weight in kinds)


def read_requests(file: str) -> list[tuple[int, int]]:
    """(input, output) tokens of every request in a .csv (with a header), .jsonl or .parquet file.

    The file has columns `input_tokens` and `output_tokens`. Raises ValueError.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no file {file!r} of request lengths; name a .csv, .jsonl or .parquet file")
    if path.suffix not in (".csv", ".jsonl", ".parquet"):
        raise ValueError(f"{file!r} is no .csv, .jsonl or .parquet file")
    try:
        if path.suffix == ".csv":
            text = path.read_text(encoding="utf-8-sig")
            rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text), skipinitialspace=True))
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        else:
            import pyarrow.parquet as pq

            rows = pq.read_table(path, columns=list(LENGTH_NAMES)).to_pylist()
        requests = [(_tokens(row[LENGTH_NAMES[0]]), _tokens(row[LENGTH_NAMES[1]])) for row in rows]
    except Exception as error:  # every format has errors of its own
        why = (str(error) or type(error).__name__).partition("\n")[0]
        problem = f"{file!r} cannot be read ({why}); it needs columns input_tokens and output_tokens, of whole numbers"
        raise ValueError(problem) from None
    short = [request for request in requests if min(request) < 1]
    if short or not requests:
        found = f"a request of {short[0]} tokens" if short else "no requests"
        raise ValueError(f"{file!r} has {found}; every request has at least one token in and one out")
    return requests


def _tokens(value: Any) -> int:
    """A number of tokens, which a file holds as text or as a number."""
    if not float(value).is_integer():
        raise ValueError(f"{value!r} is no number of tokens")
    return int(float(value))
