"""The rules by which engines read a `nemotron-nas` checkpoint, as a checker of its config and of its tensors' names and shapes.

They follow vLLM's `model_executor/models/nemotron_nas.py`, TensorRT-LLM's `_torch/models/modeling_nemotron_nas.py` and its older converter,
and DeciModel in llama.cpp's `convert_hf_to_gguf.py`. A checkpoint that breaks a rule would fail in that engine, or load and be wrong.
Of the engines vLLM was run; see benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from puzzle_ray.errors import ConfigError
from puzzle_ray.export.nemotron_nas import engine_width
from puzzle_ray.plugins import did_you_mean

Shapes = Mapping[str, tuple[int, ...]]  # tensor name -> shape, as in the files' headers
NATIVE = "export --format native, which vLLM and transformers load"


def expected(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that engines build from a config, by name, but for the head."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    attention_bias = bool(config.get("attention_bias"))
    qkv_bias = bool(config.get("qkv_bias", attention_bias))
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }

    def add(name: str, out: int, inner: int, bias: bool) -> None:
        found[f"{name}.weight"] = (out, inner)
        if bias:
            found[f"{name}.bias"] = (out,)

    for index, block in enumerate(config["block_configs"]):
        layer, attention, ffn = f"model.layers.{index}", block["attention"], block["ffn"]
        if not attention["no_op"]:
            found[f"{layer}.input_layernorm.weight"] = (hidden,)
        if attention["replace_with_linear"]:
            add(f"{layer}.self_attn.linear_attn", hidden, hidden, False)
        elif not attention["no_op"]:
            kv = heads // attention["n_heads_in_group"] * head_dim
            for name, out in (("q_proj", heads * head_dim), ("k_proj", kv), ("v_proj", kv)):
                add(f"{layer}.self_attn.{name}", out, hidden, qkv_bias)
            add(f"{layer}.self_attn.o_proj", hidden, heads * head_dim, attention_bias)
        if not ffn["no_op"]:
            found[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        if ffn["replace_with_linear"]:
            add(f"{layer}.mlp.linear_mlp", hidden, hidden, False)
        elif not ffn["no_op"]:
            width, bias = engine_width(ffn["ffn_mult"], hidden), bool(config.get("mlp_bias"))
            add(f"{layer}.mlp.gate_proj", width, hidden, bias)
            add(f"{layer}.mlp.up_proj", width, hidden, bias)
            add(f"{layer}.mlp.down_proj", hidden, width, bias)
    return found


def _tensors(config: Mapping[str, Any], shapes: Shapes) -> Iterator[str]:
    """What every engine asks: its own tensors, no more and no fewer."""
    wanted = expected(config)
    if not config.get("tie_word_embeddings"):
        wanted["lm_head.weight"] = (config["vocab_size"], config["hidden_size"])
    for name in sorted(wanted.keys() | shapes.keys()):
        if name not in shapes:
            yield f"there is no {name}"
        elif name not in wanted and name != "lm_head.weight":
            yield f"{name} has no place; {NATIVE}"
        elif name in wanted and tuple(shapes[name]) != wanted[name]:
            yield f"{name} is {list(shapes[name])}, and the engine builds {list(wanted[name])}"


def _blocks(config: Mapping[str, Any]) -> Iterator[str]:
    blocks = config["block_configs"]
    if len(blocks) != config["num_hidden_layers"]:
        yield f"block_configs has {len(blocks)} entries, and num_hidden_layers is {config['num_hidden_layers']}"
    for index, block in enumerate(blocks):
        if set(block) != {"attention", "ffn"}:
            yield f"layer {index} has {', '.join(sorted(block)) or 'nothing'} where attention and ffn belong"
            return


def _vllm(config: Mapping[str, Any], shapes: Shapes) -> Iterator[str]:
    blocks = config["block_configs"]
    if blocks[0]["attention"]["no_op"]:
        yield f"layer 0 has no attention, and vLLM's DeciLM begins with one; set search.target_format: nemotron_nas, or {NATIVE}"
    for index, block in enumerate(blocks):
        for kind, half in block.items():
            if half["replace_with_linear"]:
                yield f"layer {index} has a linear {kind}, which vLLM's DeciLM lacks; drop linear from the space, or {NATIVE}"
    if any(name.endswith("q_proj.bias") for name in shapes) and "qkv_bias" not in config and not config.get("attention_bias"):
        yield "it has biases on q, k and v, and without qkv_bias vLLM drops them; write qkv_bias: true"


def _tensorrt_llm(config: Mapping[str, Any], shapes: Shapes) -> Iterator[str]:
    biased = sorted(name for name in shapes if name.endswith(".bias"))
    if biased:
        yield f"it has {biased[0]}, and TensorRT-LLM's DeciLM builds every projection without a bias; use vLLM or transformers"


def _tensorrt_llm_legacy(config: Mapping[str, Any], shapes: Shapes) -> Iterator[str]:
    yield from _tensorrt_llm(config, shapes)
    if "lm_head.weight" not in shapes:
        yield "its head is the embedding, and TensorRT-LLM's older converter reads lm_head.weight; export with --untie"


def _llama_cpp(config: Mapping[str, Any], shapes: Shapes) -> Iterator[str]:
    for index, block in enumerate(config["block_configs"]):
        mult = block["ffn"]["ffn_mult"]
        if mult is not None and not isinstance(mult, float):
            yield f"layer {index} has ffn_mult={mult!r}, and llama.cpp's converter asserts a JSON float; write {mult}.0"
        if block["ffn"]["replace_with_linear"]:
            yield f"layer {index} has a linear ffn, which llama.cpp lacks; drop linear from the space, or use transformers"
    if any(name.endswith(".bias") for name in shapes):
        yield "it has biases, which llama.cpp's Deci graph was not seen to add; use vLLM or transformers"


def _transformers(config: Mapping[str, Any], shapes: Shapes) -> Iterator[str]:
    yield from ()


ENGINES: dict[str, Callable[[Mapping[str, Any], Shapes], Iterator[str]]] = {
    "transformers": _transformers,  # by the code in the folder
    "vllm": _vllm,
    "tensorrt_llm": _tensorrt_llm,
    "tensorrt_llm_legacy": _tensorrt_llm_legacy,
    "llama_cpp": _llama_cpp,
}


def problems_of_config(engine: str, config: Mapping[str, Any]) -> list[str]:
    """What an engine could not run of a config, whatever the weights."""
    return [*ENGINES[engine](config, {})]


def problems(engine: str, config: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """What an engine could not load, or would load and compute wrongly; a sentence each. Raises ConfigError for an unknown engine."""
    if engine not in ENGINES:
        raise ConfigError("engine", f"unknown engine {engine!r}", did_you_mean(engine, ENGINES))
    of_blocks = list(_blocks(config))
    return of_blocks or [*ENGINES[engine](config, shapes), *_tensors(config, shapes)]
