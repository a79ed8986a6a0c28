"""How one request's tokens are chosen, and the values that each setting may have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from puzzle_ray.errors import ConfigError

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends.

    max_tokens: at most this many new tokens. None: as many as there is room for. 0: the prompt is read, and nothing is added.
    temperature: 0 is greedy.
    top_p: tokens are drawn from the smallest set of the likeliest ones with at least this probability.
    top_k: tokens are drawn from this many of the likeliest ones. 0: from all.
    min_p: tokens are drawn from those with at least this share of the likeliest one's probability.
    seed: the same seed draws the same tokens, whatever else is served at the same time.
    stop: the answer ends before any of these strings.
    stop_token_ids: the answer ends after any of these tokens, as it does after an end-of-text token.
    ignore_eos: the answer does not end at an end-of-text token.
    presence_penalty, frequency_penalty: subtracted from the logit of a token that the answer has, once or as often as it has it.
    repetition_penalty: a positive logit of a token that prompt or answer have is divided by it, a negative one multiplied.
    logit_bias: (token id, number added to its logit).
    logprobs: with each token come its log-probability and those of this many of the likeliest ones. They are the model's own, before
    any of the settings above. None: none.
    prompt_logprobs: so it is for the prompt's tokens, too.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        for name, (holds, remedy) in _ALLOWED.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ConfigError(name, f"is {value}", remedy)
        if any(not text for text in self.stop):
            raise ConfigError("stop", "holds an empty string", "leave it out")
        if not all(-100 <= bias <= 100 for _, bias in self.logit_bias):
            raise ConfigError("logit_bias", "holds a number out of range", "give -100 to 100")
        if self.prompt_logprobs and self.logprobs is None:
            raise ConfigError("prompt_logprobs", "are asked for without logprobs", "say how many: logprobs=0 or more")

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens or a bias change the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1 or self.logit_bias)


# NaN compares false with everything, so every condition is written such that it must hold.
_ALLOWED: dict[str, tuple[Callable[[float], bool], str]] = {
    "max_tokens": (lambda value: value >= 0, "ask for at least 1, or for 0 to have the prompt read only"),
    "temperature": (lambda value: 0 <= value < float("inf"), "give 0 (greedy) or more"),
    "top_p": (lambda value: 0 < value <= 1, "give a share above 0, at most 1"),
    "top_k": (lambda value: value >= 0, "give 0 (all tokens) or more"),
    "min_p": (lambda value: 0 <= value <= 1, "give a share from 0 to 1"),
    "presence_penalty": (lambda value: -2 <= value <= 2, "give -2 to 2"),
    "frequency_penalty": (lambda value: -2 <= value <= 2, "give -2 to 2"),
    "repetition_penalty": (lambda value: 0.01 <= value <= 100, "give 0.01 to 100; 1 changes nothing"),
    "logprobs": (lambda value: 0 <= value <= MAX_LOGPROBS, f"give 0 to {MAX_LOGPROBS}"),
}
