"""The `nemotron-nas` (DeciLM) config of a child.

vLLM, TensorRT-LLM and llama.cpp read this format for models whose layers differ in shape. It follows the sources of these engines:
vLLM's `model_executor/models/nemotron_nas.py` and TensorRT-LLM's `_torch/models/modeling_nemotron_nas.py`.
A layer has `num_attention_heads // n_heads_in_group` KV heads. Its FFN's width is `int(2 * ffn_mult * hidden_size / 3)`, rounded up to a
multiple of 256.
Here the config is made; `deci_checkpoint.py` writes a whole checkpoint, and `engine_rules.py` checks it by the rules of each engine.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from puzzle_ray.artifacts import PARENT, LayerChoice
from puzzle_ray.errors import ConfigError, ParentError
from puzzle_ray.export import configuration_nemotron_nas as remote
from puzzle_ray.families.registry import complete_config
from puzzle_ray.variants.base import split_variant_name

WIDTH_MULTIPLE = 256
FAMILIES = ("llama", "mistral", "qwen2", "phi3")  # what DeciLM can compute; others have norms, scales or biases that it lacks
REMEDY = "use the native format (engine torch to profile), which vLLM and transformers load, too"
_LACKS = {
    "qwen3": ": it has norms over queries and keys",
    "olmo2": ": it has norms over queries and keys, and none before a half",
    "granite": ": it has multipliers on embedding, attention, residual and logits",
    "gemma2": ": it has norms behind each half, sliding windows and soft caps",
    "gemma3_text": ": it has norms behind each half and over queries and keys, and sliding windows",
}
COPIED = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def check_parent(config: Any, biases: bool = True) -> None:
    """Raises ParentError, with the reason, for a parent that DeciLM cannot compute. `biases`: whether the engine has biases."""

    family = str(config.model_type).removeprefix("puzzle_")

    def refuse(why: str) -> None:
        raise ParentError("parent", f"{family} {why}", f"the nemotron-nas format has no place for that; {REMEDY}")

    if family not in FAMILIES:
        refuse(f"is not one of {', '.join(FAMILIES)}{_LACKS.get(family, '')}")
    if config.hidden_act != "silu":
        refuse(f"with hidden_act={config.hidden_act!r}")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    sliding = window is not None and window < config.max_position_embeddings  # a longer one limits nothing
    if sliding:
        refuse(f"with sliding_window={config.sliding_window}")
    rope = dict(config.rope_parameters)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse(f"with partial_rotary_factor={rope['partial_rotary_factor']}")
    if rope.get("rope_type", "default") in ("longrope", "dynamic"):
        refuse(f"with rope_type={rope['rope_type']!r}")
    named = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    named += ["biases in its query, key and value projections"] if family == "qwen2" else []
    if named and not biases:
        refuse(f"with {named[0]}, and this engine builds every projection without a bias,")


def ffn_mult(width: int, hidden_size: int) -> float:
    """The multiplier from which engines compute `width`. Raises ConfigError for a width that they cannot have."""
    multiplier = 3 * width / (2 * hidden_size)
    if engine_width(multiplier, hidden_size) != width:
        problem = f"an FFN of {width} channels: the nemotron-nas format has multiples of {WIDTH_MULTIPLE} only"
        raise ConfigError("space.ffn", problem, f"set space.ffn_multiple_of={WIDTH_MULTIPLE}, or {REMEDY}")
    return multiplier


def engine_width(mult: float, hidden_size: int) -> int:
    """The width that engines compute from a multiplier: rounded up to a multiple of 256."""
    return -(-int(2 * mult * hidden_size / 3) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def block_config(choice: LayerChoice, config: Any) -> dict[str, dict[str, Any]]:
    """A layer's entry of `block_configs`. Raises ConfigError for a variant that the format does not have."""
    halves: dict[str, dict[str, Any]] = {}
    for kind, size_key, sized in (
        ("attention", "n_heads_in_group", ("gqa", "gqa_prune")),
        ("ffn", "ffn_mult", ("ffn", "ffn_iterative")),
    ):
        name = choice.attention if kind == "attention" else choice.ffn
        head, argument = split_variant_name(name)
        half: dict[str, Any] = {size_key: None, "no_op": head == "noop", "replace_with_linear": head == "linear"}
        if head in (PARENT, *sized):
            own = config.num_key_value_heads if kind == "attention" else config.intermediate_size
            size = own if head == PARENT else int(argument)
            half[size_key] = config.num_attention_heads // size if kind == "attention" else ffn_mult(size, config.hidden_size)
        elif head not in ("noop", "linear"):
            known = ", ".join((PARENT, *(f"{word}:N" for word in sized), "linear", "noop"))
            raise ConfigError(f"space.{kind}", f"the nemotron-nas format has no {name!r}", f"it has {known}; or {REMEDY}")
        halves[kind] = half
    return halves


def _rope(config: Any) -> dict[str, Any]:
    """The rotary settings as transformers 5 writes them, and as transformers 4 does, for readers that know only these."""
    parameters = dict(config.rope_parameters)
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    return {"rope_parameters": parameters, "rope_theta": parameters["rope_theta"], "rope_scaling": None if plain else scaling}


def nas_config(
    parent_config: Any,
    choices: Sequence[LayerChoice],
    dtype: str,
    biases: bool = True,
    more_classes: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """The content of `config.json` for a child of these choices. Raises ParentError or ConfigError for what does not fit.

    `more_classes` are entries of `auto_map` besides the config's.
    """
    config = complete_config(copy.deepcopy(parent_config))
    check_parent(config, biases)
    settings = {name: getattr(config, name) for name in COPIED if getattr(config, name, None) is not None}
    if str(config.model_type).removeprefix("puzzle_") == "qwen2":
        settings["qkv_bias"] = True  # without it, vLLM silently drops the biases
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": remote.NemotronNasConfig.model_type,
        "auto_map": {"AutoConfig": f"{Path(remote.__file__).stem}.{remote.NemotronNasConfig.__name__}"} | dict(more_classes),
        **settings,
        "attention_dropout": 0.0,
        "use_cache": True,
        **_rope(config),
        "num_hidden_layers": len(choices),
        "num_key_value_heads": None,
        "intermediate_size": None,
        "dtype": dtype,
        "torch_dtype": dtype,
        "block_configs": [block_config(choice, config) for choice in choices],
    }


def write_nas_config(folder: Path, parent_config: Any, choices: Sequence[LayerChoice], dtype: str, biases: bool = True) -> None:
    """Writes `config.json` and the class that reads it into `folder`, without weights."""
    settings = nas_config(parent_config, choices, dtype, biases)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    copy_config_class(folder)


def copy_config_class(folder: Path) -> None:
    """Writes the file that `auto_map` names for the config."""
    shutil.copyfile(remote.__file__, folder / Path(remote.__file__).name)
