"""The `vllm` engine: subblocks as vLLM serves them, with its own kernels, scheduler and CUDA graphs.

This engine was not run, since no machine with vLLM was at hand. Three things were checked. transformers 4.57 and 5.23 read its configs.
The arithmetic is tested with a stand-in for vLLM. Arguments and the shape of prompts follow vLLM's sources (`LLM`, `EngineArgs`,
`SamplingParams`, `TokensPrompt`, `model_executor/models/nemotron_nas.py`). fp8 is vLLM's own dynamic quantisation with an fp8 KV cache.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from puzzle_ray.artifacts import Scenario
from puzzle_ray.profiling.serving_engine import ServingEngine


class VllmEngine(ServingEngine):
    name = "vllm"
    package = "vllm"
    extra = "vllm"
    biases = True
    linear = False

    def arguments(self, folder: Path, scenario: Scenario, dtype: str) -> dict[str, Any]:
        fp8 = dtype == "fp8"
        return super().arguments(folder, scenario, dtype) | {
            "quantization": "fp8" if fp8 else None,
            "kv_cache_dtype": "fp8" if fp8 else "auto",
            "max_num_seqs": scenario.batch_size,
            "max_model_len": scenario.longest_tokens,
            "enable_prefix_caching": False,
            "seed": 0,
        }

    def load(self, folder: Path, scenario: Scenario, dtype: str) -> tuple[Any, Callable[..., Any]]:
        vllm = importlib.import_module("vllm")  # this module's own name, and untyped
        return vllm.LLM(**self.arguments(folder, scenario, dtype)), vllm.SamplingParams

    def sampling(self, new_tokens: int) -> dict[str, Any]:
        return super().sampling(new_tokens) | {"temperature": 0.0}

    def inputs(self, prompts: Sequence[Sequence[int]]) -> list[Any]:
        return [{"prompt_token_ids": list(ids)} for ids in prompts]


ENGINE = VllmEngine()
