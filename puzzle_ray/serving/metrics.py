"""What a server tells Prometheus: counters, gauges and histograms of an engine, in the text format.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle_ray.serving.generation import Generation

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

# field of EngineStats -> (name, type, what it is)
_OF_STATS = {
    "running": ("requests_running", "gauge", "Requests that are being answered."),
    "waiting": ("requests_waiting", "gauge", "Requests that wait for a place."),
    "prompt_tokens": ("prompt_tokens_total", "counter", "Tokens of prompts, those found in the prefix cache included."),
    "cached_tokens": ("prompt_tokens_cached_total", "counter", "Tokens of prompts that were found in the prefix cache."),
    "generated_tokens": ("generation_tokens_total", "counter", "Tokens generated; its rate is tokens per second."),
    "forward_passes": ("forward_passes_total", "counter", "Forward passes of the model."),
    "preemptions": ("preemptions_total", "counter", "Requests put back into the queue for lack of KV memory."),
    "kv_tokens": ("kv_cache_tokens", "gauge", "Tokens of requests in the key-value cache."),
    "kv_capacity_tokens": ("kv_cache_capacity_tokens", "gauge", "Tokens that the key-value cache may hold at the most."),
    "kv_cache_mib": ("kv_cache_allocated_mib", "gauge", "Memory allocated for the key-value cache."),
}


class Histogram:
    """Counts of values by upper bounds, and their sum."""

    def __init__(self, bounds: Sequence[float] = _SECONDS) -> None:
        self._bounds = (*bounds, float("inf"))
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._sum += value
        self._counts[next(index for index, bound in enumerate(self._bounds) if value <= bound)] += 1

    def lines(self, name: str, labels: Mapping[str, str]) -> Iterator[str]:
        total = 0
        for bound, count in zip(self._bounds, self._counts, strict=True):
            total += count
            limit = "+Inf" if bound == float("inf") else f"{bound:g}"
            yield f"{name}_bucket{_labels({**labels, 'le': limit})} {total}"
        yield f"{name}_sum{_labels(labels)} {self._sum}"
        yield f"{name}_count{_labels(labels)} {total}"


class EngineMetrics:
    """What is known about a request only when it ends."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._endings: dict[str, int] = {}
        self.time_to_first_token_s = Histogram()
        self.time_per_output_token_s = Histogram()
        self.request_s = Histogram()

    def ended(self, generation: Generation) -> None:
        """Note a generation that has ended; once, however often it is told."""
        ended_at, first_at = generation.ended_at, generation.first_token_at
        with self._guard:
            if ended_at is None or generation.is_counted:
                return
            generation.is_counted = True
            ending = generation.finish_reason or "failed"
            self._endings[ending] = self._endings.get(ending, 0) + 1
            self.request_s.observe(ended_at - generation.submitted_at)
            if first_at is not None:
                self.time_to_first_token_s.observe(first_at - generation.submitted_at)
                if len(generation.token_ids) > 1:
                    self.time_per_output_token_s.observe((ended_at - first_at) / (len(generation.token_ids) - 1))

    def lines(self, labels: Mapping[str, str]) -> Iterator[tuple[str, str, str, list[str]]]:
        """(name, type, help, samples) of every metric."""
        with self._guard:
            endings = [f"{_PREFIX}requests_total{_labels({**labels, 'ending': name})} {n}" for name, n in self._endings.items()]
            yield f"{_PREFIX}requests_total", "counter", "Requests that ended, by how.", endings
            for name, about, histogram in (
                ("time_to_first_token_seconds", "From a request's arrival to its first token.", self.time_to_first_token_s),
                ("time_per_output_token_seconds", "Between two tokens of a request, the mean.", self.time_per_output_token_s),
                ("request_seconds", "From a request's arrival to its end.", self.request_s),
            ):
                yield f"{_PREFIX}{name}", "histogram", about, list(histogram.lines(_PREFIX + name, labels))


_PREFIX = "puzzle_ray_"


@dataclass(frozen=True)
class Source:
    """An engine's counters (fields of EngineStats) and metrics, with the labels of their samples."""

    labels: Mapping[str, str]
    stats: Mapping[str, Any]
    metrics: EngineMetrics


def exposition(sources: Sequence[Source]) -> str:
    """The metrics of several engines as Prometheus reads them: one block per name."""
    blocks: dict[str, tuple[str, str, list[str]]] = {}

    def add(name: str, kind: str, about: str, samples: Sequence[str]) -> None:
        blocks.setdefault(name, (kind, about, []))[2].extend(samples)

    for source in sources:
        for field, (name, kind, about) in _OF_STATS.items():
            add(_PREFIX + name, kind, about, [f"{_PREFIX}{name}{_labels(source.labels)} {source.stats[field]}"])
        for name, kind, about, samples in source.metrics.lines(source.labels):
            add(name, kind, about, samples)
    lines: list[str] = []
    for name, (kind, about, samples) in blocks.items():
        lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}", *samples]
    return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    def quoted(value: str) -> str:
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'

    return "{" + ",".join(f"{name}={quoted(value)}" for name, value in labels.items()) + "}" if labels else ""
