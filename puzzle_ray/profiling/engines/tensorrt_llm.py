"""The `tensorrt_llm` engine: subblocks as TensorRT-LLM serves them, by its PyTorch backend with CUDA graphs.

This engine was not run, since no machine with TensorRT-LLM was at hand. Three things were checked. transformers 4.57 and 5.23 read its
configs. The arithmetic is tested with a stand-in for TensorRT-LLM. Arguments follow TensorRT-LLM's sources (`llmapi/llm.py`,
`llm_args.py`, `sampling_params.py`, `_torch/models/modeling_nemotron_nas.py`). fp8 is requested by `hf_quant_config.json`, as in
ModelOpt's checkpoints.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from puzzle_ray.artifacts import Scenario
from puzzle_ray.profiling.serving_engine import ServingEngine

FP8 = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}


class TensorRTEngine(ServingEngine):
    name = "tensorrt_llm"
    package = "tensorrt_llm"
    extra = "tensorrt"
    biases = False
    linear = True

    def arguments(self, folder: Path, scenario: Scenario, dtype: str) -> dict[str, Any]:
        limits = {"max_batch_size": scenario.batch_size, "max_seq_len": scenario.longest_tokens}
        return super().arguments(folder, scenario, dtype) | limits

    def load(self, folder: Path, scenario: Scenario, dtype: str) -> tuple[Any, Callable[..., Any]]:
        trt = importlib.import_module("tensorrt_llm")  # this module's own name, and untyped
        llmapi = importlib.import_module("tensorrt_llm.llmapi")
        self.quantise(folder, dtype)
        graphs = llmapi.CudaGraphConfig(batch_sizes=[scenario.batch_size])
        cache = llmapi.KvCacheConfig(enable_block_reuse=False)
        arguments = self.arguments(folder, scenario, dtype) | {"cuda_graph_config": graphs, "kv_cache_config": cache}
        return trt.LLM(**arguments), trt.SamplingParams

    def quantise(self, folder: Path, dtype: str) -> None:
        if dtype == "fp8":
            (folder / "hf_quant_config.json").write_text(json.dumps(FP8))

    def sampling(self, new_tokens: int) -> dict[str, Any]:
        return super().sampling(new_tokens) | {"end_id": -1, "pad_id": 0}  # there is no tokenizer to tell them

    def inputs(self, prompts: Sequence[Sequence[int]]) -> list[Any]:
        return [list(ids) for ids in prompts]


ENGINE = TensorRTEngine()
