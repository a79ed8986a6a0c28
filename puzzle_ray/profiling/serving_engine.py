"""What the serving engines share.

A serving engine runs one model at a time, in a process of its own, from a `nemotron-nas` config without weights.
A stack stands on a layer of the parent's own, since DeciLM in vLLM cannot begin with a layer without attention. So the stacks' common
part contains that layer, and `puzzle_ray.profiling.measure` subtracts it.
With T(G) the time of generating G tokens, a prefill takes T(1), and a decode step takes (T(G) - T(1)) / (G - 1).
Each stack fills the GPU. So stacks are timed one after the other, and not in turn as with the torch engine. A machine that changes
between two stacks therefore changes the costs.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch

from puzzle_ray.artifacts import LayerChoice, Scenario
from puzzle_ray.errors import ConfigError, ProfileError
from puzzle_ray.export.nemotron_nas import nas_config, write_nas_config
from puzzle_ray.profiling.engine import Timing, find_engine, mean_over_lengths
from puzzle_ray.profiling.machine import machine_facts
from puzzle_ray.profiling.measure import ProfileTask, StackTiming, stack_config
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Bar

Generate = Callable[[Sequence[Sequence[int]], int], float]  # prompts' token ids, tokens to generate -> seconds


class ServingEngine:
    """An engine in a serving package. A subclass says how to start it."""

    name: ClassVar[str]
    package: ClassVar[str]
    extra: ClassVar[str]
    biases: ClassVar[bool]  # whether its projections may have biases
    linear: ClassVar[bool]  # whether it can run linear subblocks

    def load(self, folder: Path, scenario: Scenario, dtype: str) -> tuple[Any, Callable[..., Any]]:
        """The package's `LLM` with random weights, on the config in `folder` and for the scenario's batches; its sampling class."""
        raise NotImplementedError

    def arguments(self, folder: Path, scenario: Scenario, dtype: str) -> dict[str, Any]:
        """The arguments of the package's `LLM` that are plain values."""
        return {
            "model": str(folder),
            "trust_remote_code": True,  # the config class beside config.json, which we wrote
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16" if dtype == "fp8" else dtype,
        }

    def sampling(self, new_tokens: int) -> dict[str, Any]:
        """Sampling settings with which exactly `new_tokens` tokens are generated."""
        return {"max_tokens": new_tokens, "ignore_eos": True, "detokenize": False}

    def inputs(self, prompts: Sequence[Sequence[int]]) -> list[Any]:
        """Token ids as the package wants them."""
        raise NotImplementedError

    def start(self, folder: Path, scenario: Scenario, dtype: str) -> Generate:
        """Loads a model. The returned function generates, and returns how many seconds that took."""
        llm, settings = self.load(folder, scenario, dtype)

        def generate(prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
            inputs, wanted = self.inputs(prompts), settings(**self.sampling(new_tokens))
            started = time.perf_counter()
            llm.generate(inputs, wanted, use_tqdm=False)
            return time.perf_counter() - started

        return generate

    def configured(self, config: ProfileConfig) -> ServingEngine:
        """The engine itself. Raises ConfigError where the package or the GPU is missing."""
        self.version()
        if config.num_gpus != 1:
            problem = f"engine {self.name} runs on one GPU, and profile.num_gpus is {config.num_gpus:g}"
            raise ConfigError("profile.num_gpus", problem, "set profile.num_gpus=1")
        return self

    def version(self) -> str:
        try:
            return f"{self.package} {metadata.version(self.package)}"
        except metadata.PackageNotFoundError:
            remedy = f'pip install "puzzle_ray[{self.extra}]" here and on every node that profiles'
            raise ConfigError(
                "profile.engine", f"{self.name} needs the package {self.package}, which is not installed", remedy
            ) from None

    def device_name(self, use_gpu: bool = False) -> str:
        return torch.cuda.get_device_name(self._gpu())

    def facts(self, use_gpu: bool = False) -> dict[str, Any]:
        return machine_facts(self._gpu())

    def _gpu(self) -> torch.device:
        if not torch.cuda.is_available():
            raise ProfileError(
                "profile.engine", f"{self.name} needs a GPU, and PyTorch sees none here", "use engine torch or roofline"
            )
        return torch.device("cuda")

    def check(self, task: ProfileTask, model_config: Any) -> None:
        """Raises ConfigError or ParentError for what the format or the engine cannot do. Needs neither the package nor a GPU."""
        for choice in dict.fromkeys(choice for choice, _ in task.stacks(1)):
            if not self.linear and "linear" in (choice.attention, choice.ffn):
                remedy = "drop linear from the search space, or use engine torch"
                raise ConfigError("space", f"{self.name} has no linear subblocks", remedy)
            nas_config(model_config, [LayerChoice(), choice], "bfloat16", self.biases)

    def time_stacks(self, task: ProfileTask, model_config: Any, config: ProfileConfig, bar: Bar | None) -> list[StackTiming]:
        """The times of all stacks of a task. Raises as `check` does before anything runs, and ProfileError."""
        self.check(task, model_config)
        scenario = replace(config.scenario, batch_size=task.batch_size)
        dtype = "bfloat16" if config.dtype == "fp8" else config.dtype
        with tempfile.TemporaryDirectory() as root:
            folders = {}
            for index, (choice, depth) in enumerate(task.stacks(config.stack)):
                folders[choice, depth] = Path(root) / str(index)
                shape = stack_config(model_config, task.layer_type, depth + 1)
                write_nas_config(folders[choice, depth], shape, [LayerChoice(), *[choice] * depth], dtype, self.biases)
            timings = []
            for (choice, depth), folder in folders.items():
                timing = self._isolated(folder, scenario, config)
                timings.append(StackTiming(choice.attention, choice.ffn, depth, timing))
                if bar is not None:
                    bar.advance(config.repeats + 1)
        return timings

    def _isolated(self, folder: Path, scenario: Scenario, config: ProfileConfig) -> Timing:
        """Times one stack in a process of its own. The end of the process frees all GPU memory."""
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                return pool.submit(time_one, self.name, folder, scenario, config.dtype, config.repeats).result()
            except BrokenProcessPool:
                shape = json.loads((folder / "config.json").read_text())["block_configs"][-1]
                problem = f"{self.name} died at batch size {scenario.batch_size} on layers of {shape}"
                raise ProfileError("profile", problem, "if it lacked memory, lower profile.stack or the batch size") from None

    def timed(self, generate: Generate, vocab_size: int, scenario: Scenario, repeats: int) -> Timing:
        """`repeats` samples after a warm-up."""
        samples = [self._sample(generate, vocab_size, scenario) for _ in range(repeats + 1)][1:]
        return Timing(tuple(p for p, _ in samples), tuple(d for _, d in samples))

    def _sample(self, generate: Generate, vocab_size: int, scenario: Scenario) -> tuple[float, float]:
        """(prefill_ms, decode_ms), as means over the kinds of requests."""
        samples = []
        for shape, _ in scenario.shapes:
            prompts = torch.randint(vocab_size, (shape.batch_size, int(shape.input_tokens))).tolist()
            first_s, steps = generate(prompts, 1), int(shape.output_tokens) - 1
            all_s = generate(prompts, steps + 1) if steps else first_s
            samples.append((1e3 * first_s, 1e3 * max(0.0, all_s - first_s) / steps if steps else 0.0))
        return mean_over_lengths(scenario, samples)


def time_one(name: str, folder: Path, scenario: Scenario, dtype: str, repeats: int) -> Timing:
    """Times one stack, in this process."""
    engine: Any = find_engine(name)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    timing: Timing = engine.timed(engine.start(folder, scenario, dtype), vocab_size, scenario, repeats)
    return timing
