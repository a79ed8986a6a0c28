"""The `torch` engine: a model's plain `forward()` with transformers' DynamicCache, eager, on the CPU or one GPU.

A prefill is one forward of the whole batch's prompts, with logits for the last position only. It fills the cache and gives the first
token. Every further token is one decode step of the whole batch. The cache grows from `input_tokens` on.
On a GPU it runs eagerly too, as our server does. The engines `vllm` and `tensorrt_llm` measure with CUDA graphs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from puzzle_ray.artifacts import LayerChoice, Scenario
from puzzle_ray.errors import ProfileError
from puzzle_ray.models.child import new_child
from puzzle_ray.models.describe import describe
from puzzle_ray.process import keep_freed_memory
from puzzle_ray.profiling.engine import Timing, measure_side_by_side
from puzzle_ray.profiling.machine import cpu_name, machine_facts
from puzzle_ray.surgery.kv_cache import cache_from, continuing


class TorchEngine:
    name = "torch"

    def version(self) -> str:
        return f"torch {torch.__version__}, transformers {transformers.__version__}"

    def device_name(self, use_gpu: bool = False) -> str:
        """The GPU's name, or the CPU's with the number of threads computed on."""
        if use_gpu:
            return torch.cuda.get_device_name(self._device(use_gpu))
        return f"{cpu_name()}, {torch.get_num_threads()} threads"

    def facts(self, use_gpu: bool = False) -> dict[str, Any]:
        return machine_facts(self._device(use_gpu))

    def _device(self, use_gpu: bool) -> torch.device:
        if use_gpu and not torch.cuda.is_available():
            raise ProfileError("profile.num_gpus", "a GPU is asked for, but PyTorch sees none here", "set profile.num_gpus=0")
        return torch.device("cuda" if use_gpu else "cpu")

    def build(self, config: Any, choices: Sequence[LayerChoice], dtype: str, use_gpu: bool = False, like: Any = None) -> Any:
        """A model of `choices` with random weights. To save memory, embedding, final norm and head are shared with `like`."""
        with self._device(use_gpu) as device:
            model = new_child(config, choices, getattr(torch, dtype)).eval().to(device)
        if like is not None:
            descriptor = describe(config)
            for name in (descriptor.embedding, descriptor.final_norm, descriptor.head):
                model.set_submodule(name, like.get_submodule(name))
        return model

    @torch.inference_mode()
    def time_once(self, model: Any, scenario: Scenario) -> tuple[float, float]:
        """(prefill_ms, decode_ms) of one batch of random tokens, on the model's device. decode_ms is 0 where there is no step."""
        if model.device.type == "cpu":
            keep_freed_memory()
        prompt, steps = int(scenario.input_tokens), int(scenario.output_tokens) - 1
        shape = (scenario.batch_size, prompt + steps)
        ids = torch.randint(model.config.vocab_size, shape, device=model.device)
        started = self._now(model.device)
        out = model(ids[:, :prompt], use_cache=True, logits_to_keep=1)
        cache = cache_from(out)
        prefilled = self._now(model.device)
        for position in range(prompt, shape[1]):
            model(ids[:, position : position + 1], **continuing(cache), logits_to_keep=1)
        done = self._now(model.device)
        return 1e3 * (prefilled - started), 1e3 * (done - prefilled) / max(1, steps) if steps else 0.0

    def _now(self, device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def time_model(self, model: Any, scenario: Scenario, repeats: int) -> Timing:
        """One model, `repeats` times after a warm-up."""
        return measure_side_by_side({self.name: model}, scenario, repeats, engine=self)[self.name]


ENGINE = TorchEngine()
