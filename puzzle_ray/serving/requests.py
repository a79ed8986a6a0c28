"""The bodies of OpenAI's completions and chat completions.

A field that the engine cannot honour is refused, never ignored. Unknown fields are refused by name. Fields that are known and not
supported may have the values that change nothing (`response_format: {"type": "text"}`, `tool_choice: "none"`, ...). Not OpenAI's are
`top_k`, `min_p`, `repetition_penalty`, `stop_token_ids` and `ignore_eos`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, field_validator, model_validator

from puzzle_ray.errors import ConfigError
from puzzle_ray.serving.api_errors import BodyRefused, Json
from puzzle_ray.serving.sampling import SamplingParams
from puzzle_ray.serving.sampling_defaults import SamplingDefaults

_DEFAULT_MAX_TOKENS = 16  # OpenAI's documented default for completions; chat has no default limit
_MAX_STOP_STRINGS = 32  # OpenAI takes 4; tasks of lm-evaluation-harness have more
_MAX_CHOICES = 128
_MAX_BIASES = 1024
_MAX_STOP_IDS = 1024
_MAX_FIELDS = 200  # of one object: each unknown one is an error of its own
_NONE = SamplingDefaults()
_SEED_STEP = 0x9E3779B97F4A7C15  # between the seeds of a request's choices


class _UpToAnError:
    """Of a list of a million wrong values, the first is told: an error takes a kilobyte, and some microseconds of the event loop."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return {**handler(source), "fail_fast": True}


_Ids = Annotated[list[int], _UpToAnError()]
_Texts = Annotated[list[str], _UpToAnError()]
Neutral = dict[str, tuple[Any, ...] | None]  # field -> values that change nothing; None: no value changes the answer
Request = TypeVar("Request", bound="GenerationRequest")


class Fields(BaseModel):
    """An object in a body. Unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _check_number_of_fields(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and len(fields) > _MAX_FIELDS:
            raise ConfigError("body", f"has an object of {len(fields)} fields", f"send at most {_MAX_FIELDS}")
        return fields


class StreamOptions(Fields):
    """`include_usage`: the stream ends with one more chunk, which has the token counts."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(Fields):
    """The fields that completions and chat completions share. null stands for a field's default."""

    neutral: ClassVar[Neutral] = {
        "service_tier": ("auto", "default"),
        "metadata": None,
        "safety_identifier": None,
        "prompt_cache_key": None,
        "prompt_cache_options": None,
        "prompt_cache_retention": None,
    }

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | _Texts | None = None
    stop_token_ids: _Ids | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    user: str | None = None

    # These validators raise ConfigError, which pydantic passes on. It names the field, as OpenAI's errors do.

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_fields(cls, fields: Any) -> Any:
        return without_neutral(fields, cls.neutral)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _check_number_of_biases(cls, biases: Any) -> Any:
        if isinstance(biases, dict) and len(biases) > _MAX_BIASES:
            raise ConfigError("logit_bias", f"names {len(biases)} tokens", f"give at most {_MAX_BIASES}")
        return biases

    @model_validator(mode="after")
    def _check_shared(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ConfigError("stream_options", "is for streams", "send stream=true, or leave it out")
        if not 1 <= self.num_choices <= _MAX_CHOICES:
            raise ConfigError("n", f"is {self.num_choices}", f"give 1 to {_MAX_CHOICES}")
        if len(self.stop_token_ids or ()) > _MAX_STOP_IDS:
            raise ConfigError("stop_token_ids", f"holds {len(self.stop_token_ids or ())} ids", f"give at most {_MAX_STOP_IDS}")
        return self

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def num_candidates(self) -> int:
        """Answers that are generated to each prompt; the best ones are returned."""
        return self.num_choices

    @property
    def num_prompts(self) -> int:
        """Texts to continue."""
        return 1

    def sampling_params(self, defaults: SamplingDefaults = _NONE) -> list[SamplingParams]:
        """The sampling parameters of each candidate for a prompt. The first has the request's own seed. Raises ConfigError.

        `defaults` are the model's, for fields that the request leaves out.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > _MAX_STOP_STRINGS:
            raise ConfigError("stop", f"holds {len(stop)} strings", f"give at most {_MAX_STOP_STRINGS}")
        names = {"temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "presence_penalty", "frequency_penalty"}
        given = self.model_dump(include=names | {"repetition_penalty"}, exclude_none=True)
        if given.get("top_k") == -1:  # vLLM's word for all tokens
            given["top_k"] = 0
        one = SamplingParams(
            max_tokens=self.default_token_limit(defaults) if self.token_limit() is None else self.token_limit(),
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=tuple((self._token_id(name), bias) for name, bias in (self.logit_bias or {}).items()),
            **self.logprob_params(),
            **{**defaults.values, **given},
        )
        if one.seed is None:
            return [one] * self.num_candidates
        return [replace(one, seed=one.seed + index * _SEED_STEP) for index in range(self.num_candidates)]

    def token_limit(self) -> int | None:
        """The largest number of tokens to generate. None: as many as fit."""
        return self.max_tokens

    def default_token_limit(self, defaults: SamplingDefaults) -> int | None:
        """The limit of a request that gives none. It may be more than what there is room for."""
        return defaults.max_tokens

    def within(self, params: SamplingParams, room: int) -> SamplingParams:
        """The parameters where only `room` more tokens fit. What was asked for stays, and is refused if it is too much."""
        if self.token_limit() is not None or params.max_tokens is None:
            return params
        return replace(params, max_tokens=min(params.max_tokens, max(room, 1)))

    def logprob_params(self) -> dict[str, Any]:
        """The sampling parameters about log-probabilities."""
        return {}

    @staticmethod
    def _token_id(name: str) -> int:
        if not (name.isascii() and name.isdigit() and len(name) < 16):
            raise ConfigError(
                "logit_bias", f"{name!r} is no token id", 'write {"id": bias}, with ids as the tokenizer numbers them'
            )
        return int(name)


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions: one text or token list, or several with `n` choices each."""

    neutral: ClassVar[Neutral] = {**GenerationRequest.neutral, "suffix": ("",)}

    prompt: str | _Ids | _Texts | Annotated[list[_Ids], _UpToAnError()]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _false_is_none(cls, logprobs: Any) -> Any:
        return None if logprobs is False else logprobs  # as chat has it; 0 would be log-probabilities without alternatives

    @model_validator(mode="after")
    def _check_own(self) -> CompletionRequest:
        if not self.num_choices <= self.num_candidates <= _MAX_CHOICES:
            raise ConfigError("best_of", f"is {self.best_of}", f"give n ({self.num_choices}) to {_MAX_CHOICES}")
        if self.stream and self.num_candidates > self.num_choices:
            raise ConfigError("best_of", "cannot be streamed: the best one is known at the end", "leave out stream or best_of")
        if self.max_tokens == 0 and not self.echo:
            raise ConfigError("max_tokens", "is 0", "ask for at least 1, or for echo=true")
        return self

    @property
    def num_candidates(self) -> int:
        return self.num_choices if self.best_of is None else self.best_of

    @property
    def num_prompts(self) -> int:
        return len(self.prompts())

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as they were given, in one list. Raises ConfigError."""
        prompt: Any = self.prompt
        several = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))
        prompts = prompt if several else [prompt]
        if not prompts:
            raise ConfigError("prompt", "is empty", "give a text or a list of token ids")
        return list(prompts)

    def default_token_limit(self, defaults: SamplingDefaults) -> int | None:
        return _DEFAULT_MAX_TOKENS

    def logprob_params(self) -> dict[str, Any]:
        ranked = self.num_candidates > self.num_choices  # by log-probability
        number = 0 if self.logprobs is None and ranked else self.logprobs
        return {"logprobs": number, "prompt_logprobs": bool(self.echo) and self.logprobs is not None}


class TextPart(Fields):
    """A part of a message's content. There are only texts."""

    neutral: ClassVar[Neutral] = {"prompt_cache_breakpoint": None}

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("type") not in (None, "text"):
            raise ConfigError(
                "messages", f"a part of type {_short(fields['type'])} is not supported", 'send parts of type "text"'
            )
        return without_neutral(fields, cls.neutral)

    type: Literal["text"]
    text: str


class ChatMessage(Fields):
    """One turn of a conversation, text only."""

    neutral: ClassVar[Neutral] = {
        "tool_calls": ([],),
        "refusal": (),
        "audio": (),
        "function_call": (),
        "tool_call_id": (),
        "annotations": ([],),
    }

    role: str
    content: str | Annotated[list[TextPart], _UpToAnError()]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_fields(cls, fields: Any) -> Any:
        return without_neutral(fields, cls.neutral)

    def turn(self) -> dict[str, str]:
        """What a chat template gets. Parts are joined by line breaks."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({} if self.name is None else {"name": self.name})


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    neutral: ClassVar[Neutral] = {
        **GenerationRequest.neutral,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": None,  # there are no tool calls
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "store": (False,),
        "prediction": (),
        "audio": (),
        "web_search_options": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
    }

    messages: Annotated[list[ChatMessage], _UpToAnError()] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_tools_not_to_be_called(cls, fields: Any) -> Any:
        """A model that must not call any tool answers in text, as this one does."""
        if not isinstance(fields, dict):
            return fields
        unused = {
            tools for tools, choice in (("tools", "tool_choice"), ("functions", "function_call")) if fields.get(choice) == "none"
        }
        return {name: value for name, value in fields.items() if name not in unused}

    @model_validator(mode="after")
    def _check_own(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ConfigError("top_logprobs", "is given without logprobs", "send logprobs=true, or leave it out")
        if self.token_limit() == 0:
            raise ConfigError("max_tokens", "is 0", "ask for at least 1")
        return self

    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def logprob_params(self) -> dict[str, Any]:
        return {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}


def without_neutral(fields: Any, neutral: Neutral) -> Any:
    """The fields without those that change nothing. Raises ConfigError for one that is not supported and would."""
    if not isinstance(fields, dict):
        return fields
    for name in neutral.keys() & fields.keys():
        accepted = neutral[name]
        if fields[name] is not None and accepted is not None and not any(fields[name] == value for value in accepted):
            raise ConfigError(name, f"{_short(fields[name])} is not supported", "leave it out")
    return {name: value for name, value in fields.items() if name not in neutral}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def parse(kind: type[Request], body: bytes) -> Request:
    """A request from its body. Raises ConfigError, BodyRefused, or pydantic's ValidationError."""
    try:
        fields: Json = json.loads(body)
    except RecursionError:
        raise BodyRefused(400, "the body is nested too deeply") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise BodyRefused(400, f"the body is not JSON: {_short(str(error))}") from None
    try:
        return kind.model_validate(fields)
    except RecursionError:
        raise BodyRefused(400, "the body is nested too deeply") from None
