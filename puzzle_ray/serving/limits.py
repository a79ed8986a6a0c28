"""How long a request may be, and how much memory the key-value cache may take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from puzzle_ray.errors import ConfigError
from puzzle_ray.models.rope import constant_up_to

# Shares of what is free when the engine starts. On a GPU nothing else wants it; on a CPU the machine has other work.
_SHARE_OF_GPU, _SHARE_OF_CPU = 0.8, 0.3


class TooLong(ConfigError):
    """A prompt, or a prompt with what was asked for, that no row can hold."""


def position_limit(config: Any) -> int:
    """The longest request that the model computes alike in any company. Raises ConfigError for a model without position limit.

    It is the number of positions. Rotary frequencies that depend on the length of the batch's longest row (longrope) would let one
    request change another's tokens. So such a model is limited to the length up to which its frequencies are constant. (Those of type
    `dynamic` are constant up to max_position_embeddings.)
    """
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is None:
        problem = f"{config.model_type} has no max_position_embeddings"
        raise ConfigError("model", problem, "the engine serves models that take position ids")
    return min(limit, constant_up_to(config) or limit)


def check_length(config: Any, max_length: int | None) -> int:
    """The tokens of prompt and answer that a request may have. Raises ConfigError."""
    limit = position_limit(config)
    if max_length is None or 2 <= max_length <= limit:
        return max_length or limit
    if limit < max_length <= config.max_position_embeddings:
        problem = f"is {max_length}, and from {limit + 1} tokens on, one request would change the rotary frequencies (longrope) of others"
        raise ConfigError("max_length", problem, f"give 2 to {limit}, or 0 for that")
    raise ConfigError("max_length", f"is {max_length}", f"give 2 to {limit}, the model's own limit, or 0 for that")


def free_memory_bytes(device: torch.device) -> int:
    """Memory that the key-value cache may take where nobody says how much."""
    if device.type == "cuda":
        return int(_SHARE_OF_GPU * torch.cuda.mem_get_info(device)[0])
    import psutil

    free = [psutil.virtual_memory().available]
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        free.append(max(0, limit - used))
    return int(_SHARE_OF_CPU * min(free))


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return None
