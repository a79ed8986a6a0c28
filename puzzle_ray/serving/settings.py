"""Settings of a server, as its command line and a Serve configuration file give them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from puzzle_ray.errors import ConfigError
from puzzle_ray.settings import Count, DType, NonNegative, Positive, Section

# Requests a replica takes on top of what its engine holds, so that /health and refusals get through at full load.
_SPARE_REQUESTS = 16
# What only this package's engine and routes do. Another engine's own settings are in `engine_options`.
_OURS = (
    "prefill_tokens", "kv_cache_mib", "stall_timeout_s", "max_body_mib", "body_timeout_s", "stream_interval_ms", "api_key_sha256",
    "allowed_origins",
)  # fmt: skip


class AutoscalingSettings(Section):
    """How many replicas there are: so many that each has about `target_ongoing_requests`, queued ones included.

    It is acted upon once that has held for `upscale_delay_s` or `downscale_delay_s`. These are the words of Serve's autoscaling_config.
    """

    min_replicas: Count = 1
    max_replicas: Count = 1
    target_ongoing_requests: Positive = 16.0
    upscale_delay_s: NonNegative = 30.0
    downscale_delay_s: NonNegative = 600.0


class ServeSettings(Section):
    """A server of one or several models behind OpenAI's API.

    models: name in requests -> Hugging Face folder (a path, an fsspec URL or a hub id). Several models share a replica and its memory.
    `child` in place of it names one folder; its last part is the model's name.
    engine: `puzzle` is this package's own, for CPUs and GPUs. `vllm` (through ray.serve.llm) and `tensorrt_llm` are imported when
    chosen, take one model each, and are given `engine_options` as they are. API keys, origins and limits on bodies are not theirs.
    generation_config: `auto` gives fields that a request leaves out the values in the model's generation_config.json (temperature, top_p,
    top_k, min_p, penalties, and max_new_tokens in chat). `none` gives them OpenAI's defaults. End-of-text tokens are always the file's.
    max_length: tokens of prompt and answer; 0 is the model's own limit.
    kv_cache_mib: memory of a replica for keys and values, of all its models together; 0 is a share of what is free.
    num_replicas and autoscaling: give one of them.
    """

    models: Annotated[dict[str, str], Field(min_length=1)]
    engine: Literal["puzzle", "vllm", "tensorrt_llm"] = "puzzle"
    engine_options: dict[str, Any] = {}
    generation_config: Literal["auto", "none"] = "auto"
    dtype: DType | Literal["auto"] = "auto"
    max_batch_size: Count = 16
    max_length: Annotated[int, Field(ge=0)] = 0
    max_waiting: Count = 256
    prefill_tokens: Count = 512
    kv_cache_mib: NonNegative = 0.0
    prefix_cache: bool = True
    stall_timeout_s: Positive = 300.0
    max_body_mib: Positive = 4.0
    body_timeout_s: Positive = 30.0
    stream_interval_ms: NonNegative = 20.0
    api_key_sha256: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    num_replicas: Count = 1
    autoscaling: AutoscalingSettings | None = None
    num_cpus: Count = 1
    num_gpus: NonNegative = 0.0
    grace_period_s: Positive = 30.0

    @model_validator(mode="before")
    @classmethod
    def _one_child(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or "child" not in fields:
            return fields
        child, rest = fields["child"], {name: value for name, value in fields.items() if name != "child"}
        if "models" in rest or not isinstance(child, str):
            raise ConfigError("child", f"is {child!r}", "name one folder there, or several in models")
        return {**rest, "models": {model_name(child): child}}

    @model_validator(mode="after")
    def _check(self) -> ServeSettings:
        if self.autoscaling is not None and self.num_replicas != 1:
            raise ConfigError("num_replicas", "is given together with autoscaling", "give one of them")
        if self.autoscaling is not None and self.autoscaling.min_replicas > self.autoscaling.max_replicas:
            raise ConfigError("autoscaling.min_replicas", "is more than max_replicas", "give a smaller one")
        if self.engine != "puzzle" and len(self.models) > 1:
            raise ConfigError(
                "models", f"names {len(self.models)}, and engine {self.engine} takes one", "deploy an application each"
            )
        given = [name for name in _OURS if getattr(self, name) != type(self).model_fields[name].default]
        if self.engine != "puzzle" and given:
            raise ConfigError(given[0], f"is for engine puzzle, and engine is {self.engine}", "leave it out, see engine_options")
        if self.engine == "puzzle" and self.engine_options:
            raise ConfigError("engine_options", "are for engines vllm and tensorrt_llm", "leave them out")
        wrong = [digest for digest in self.api_key_sha256 if len(digest) != 64]
        if wrong:
            raise ConfigError("api_key_sha256", f"{wrong[0]!r} is no SHA-256", "give hexadecimal digests, 64 characters each")
        return self

    @property
    def held_requests(self) -> int:
        """Requests that a replica holds at the most: answered and waiting ones of all its models."""
        return (self.max_batch_size + self.max_waiting) * len(self.models)

    @property
    def max_ongoing_requests(self) -> int:
        """Requests that Serve sends to one replica at the same time."""
        return self.held_requests + _SPARE_REQUESTS

    @property
    def most_replicas(self) -> int:
        """The number of replicas that have to find room at the start."""
        return self.num_replicas if self.autoscaling is None else self.autoscaling.min_replicas


def model_name(folder: str) -> str:
    """What a model is called where nobody says: the last part of its path."""
    return folder.rstrip("/").rsplit("/", 1)[-1]
