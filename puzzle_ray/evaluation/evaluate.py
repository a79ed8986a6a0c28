"""Evaluation: held-out predictions and measured speed of the parent and its children, in one process, one model at a time.

A model that no node holds whole is evaluated with its layers in shards (see `puzzle_ray.models.shards`): the same figures, and no speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from puzzle_ray.artifacts import Architecture, Scenario
from puzzle_ray.data.packing import positions_in_documents
from puzzle_ray.errors import ConfigError
from puzzle_ray.evaluation.comparison import Comparison
from puzzle_ray.evaluation.settings import EvaluateConfig
from puzzle_ray.models.blocks import CPU
from puzzle_ray.models.checkpoint import Checkpoint, locate
from puzzle_ray.models.child import model_without_weights, quiet_transformers
from puzzle_ray.models.head import Head
from puzzle_ray.models.shards import LayersOf, ShardedModel, states_of_batches
from puzzle_ray.models.spread import load_on
from puzzle_ray.models.tokenizer import tokenizer_of
from puzzle_ray.process import available_bytes, devices_for, give_back_freed_memory
from puzzle_ray.profiling.engine import Engine, Timing, find_engine, measure_side_by_side
from puzzle_ray.profiling.memory import kv_cache_bytes, model_memory_mib
from puzzle_ray.progress import Bar, Progress
from puzzle_ray.scoring.downstream import answer_questions
from puzzle_ray.scoring.metrics import PredictionMetrics, compare_heads, mean, parents_own

PARENT = "parent"
BEFORE = "child_before_gkd"  # has the shapes of `child`
ROOM = 1.25  # times the weights of all models that are timed together: they have activations, too


class Models(Mapping[str, Any]):
    """Models by name, each read from its folder whenever it is asked for, in its own dtype, to one device or over several. Keeps none."""

    def __init__(self, folders: Mapping[str, str], devices: Sequence[torch.device], dtype: torch.dtype | None = None) -> None:
        self.folders, self.devices, self.dtype = folders, devices, dtype

    def __getitem__(self, name: str) -> Any:
        give_back_freed_memory()  # what was computed with the one before
        return load_on(self.folders[name], self.dtype, self.devices)

    def __iter__(self) -> Iterator[str]:
        return iter(self.folders)

    def __len__(self) -> int:
        return len(self.folders)


class ShardedModels(Mapping[str, Any]):
    """Models by name whose layers lie in shards, in their own dtypes; what is at their ends is read to one device when it is asked for."""

    def __init__(self, folders: Mapping[str, str], layers_of: LayersOf, device: torch.device) -> None:
        self.folders, self.layers_of, self.device = folders, layers_of, device

    def __getitem__(self, name: str) -> ShardedModel:
        give_back_freed_memory()
        return ShardedModel(self.folders[name], self.layers_of, device=self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.folders)

    def __len__(self) -> int:
        return len(self.folders)


class Reference:
    """What is kept of the parent to compare children with: its final hidden states on the batches, and its head.

    Of a model in shards, states are kept in the host's memory: a GPU that no model of its size fits has no room for those of much text.
    `separator` is the token that documents begin with, where attention does not cross them (see `puzzle_ray.data.packing`).
    """

    def __init__(self, parent: Any, batches: Sequence[Tensor], separator: int | None = None) -> None:
        self.head, self.batches = Head.of(parent).alone(), [ids.to(parent.device) for ids in batches]
        self.separator, self.device = separator, parent.device
        kept_on = CPU if isinstance(parent, ShardedModel) else parent.device
        self.finals = [final.to(kept_on) for final in self._finals(parent)]

    def _finals(self, model: Any) -> Iterator[Tensor]:
        return states_of_batches(model, self.batches, [positions_in_documents(ids, self.separator) for ids in self.batches])

    def of_parent(self) -> dict[str, float]:
        pairs = zip(self.batches, self.finals, strict=True)
        return _figures([parents_own(self.head, ids, final.to(self.device)) for ids, final in pairs])

    def of_child(self, child: Any) -> dict[str, float]:
        head, triples = Head.of(child), zip(self.batches, self.finals, self._finals(child), strict=True)
        return _figures([compare_heads(self.head, head, ids, final.to(self.device), own) for ids, final, own in triples])


def _figures(parts: Sequence[PredictionMetrics]) -> dict[str, float]:
    joined = PredictionMetrics.joined(parts)
    return {
        "heldout_loss": mean(joined.lm_loss),
        "kl": mean(joined.kl),
        "top1_agreement": mean(joined.top1_agreement),
        "heldout_tokens": float(joined.tokens),
    }


@torch.inference_mode()
def predictions(
    models: Mapping[str, Any],
    batches: Sequence[Tensor],
    also: Callable[[str, Any], Mapping[str, float]] = lambda *_: {},
    separator: int | None = None,
) -> dict[str, dict[str, float]]:
    """Held-out loss, KL(parent || model) and top-1 agreement of every model, in nats per token. `parent` must be among the models.

    They are asked for one after the other, the parent first, and logits exist for a few tokens at a time. `also` is called with each
    model's name and the model, and returns more figures. `separator` is as of `Reference`.
    """
    out: dict[str, dict[str, float]] = {}
    parent = models[PARENT]
    reference = Reference(parent, batches, separator)
    out[PARENT] = reference.of_parent() | dict(also(PARENT, parent))
    del parent
    for name in models:
        if name != PARENT:
            child = models[name]
            out[name] = reference.of_child(child) | dict(also(name, child))
            del child
    return {name: out[name] for name in models}


def speeds(timings: Mapping[str, Timing], scenario: Scenario) -> dict[str, dict[str, float]]:
    """Rates from measured times, in tokens per second.

    Prefill counts prompt tokens. Decode counts one token per sequence and step. Throughput counts the tokens of prompt and answer.
    """
    out = {}
    for name, timing in timings.items():
        runtime_ms = timing.prefill_ms + (scenario.output_tokens - 1) * timing.decode_ms
        out[name] = {
            "prefill_ms": timing.prefill_ms,
            "decode_ms": timing.decode_ms,
            "runtime_ms": runtime_ms,
            "prefill_tokens_per_s": 1e3 * scenario.batch_size * scenario.input_tokens / timing.prefill_ms,
            "decode_tokens_per_s": 1e3 * scenario.batch_size / timing.decode_ms if scenario.output_tokens > 1 else 0.0,
            "throughput_tokens_per_s": 1e3 * scenario.batch_size * scenario.tokens_per_sequence / runtime_ms,
        }
    return out


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Behind the beginning-of-sequence token, if the tokenizer has one."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]


def check_prompt(config: EvaluateConfig, tokenizer: Any, max_positions: int | None, vocab_size: int | None = None) -> None:
    """Raises ConfigError for a prompt that no text can be generated behind."""
    ids = prompt_ids(tokenizer, config.prompt)
    count = len(ids)
    if vocab_size is not None and max(ids, default=0) >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        problem = f"it has {token!r}, and the parent's embedding of {vocab_size} rows none for that token"
        raise ConfigError("evaluate.prompt", problem, "leave it out")
    if not count:
        problem = f"{config.prompt!r} has no token, and the parent's tokenizer has none that begins a text"
        raise ConfigError("evaluate.prompt", problem, "write a word or more")
    if max_positions is not None and count + config.sample_tokens - 1 > max_positions:  # the last token is not read again
        problem = f"{config.sample_tokens} tokens behind the {count} of evaluate.prompt do not fit the parent's {max_positions} positions"
        raise ConfigError("evaluate.sample_tokens", problem, "ask for fewer, or shorten evaluate.prompt")


@torch.inference_mode()
def greedy_sample(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """The prompt and its greedy continuation."""
    ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=model.device)
    known = {"do_sample": False, "return_dict_in_generate": False, "pad_token_id": tokenizer.eos_token_id}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **known)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def evaluate(
    folders: Mapping[str, str], batches: Sequence[Tensor], how: Comparison, progress: Progress, num_gpus: float = 0
) -> dict[str, Any]:
    """Evaluates the named models (`parent`, `child_before_gkd`, `child`, ...), read one at a time in their own dtype.

    With several GPUs every model is spread over them.

    The parent is timed at the scenario's batch size, children at the batch size that their architecture was chosen for, alternately
    where all of them fit into memory together. The profile's `engine` times them where it is `puzzle` and one device holds a model, and
    engine `torch` otherwise, in bfloat16 where `dtype` is fp8. Returns JSON-able `models`, `samples` and `scenario`, and the predicted
    and the measured speed-up, both ratios of throughputs. `estimated` says that the prediction was computed from a profile without
    measurements. With `questions`, every model also has its accuracy and the other measures of its answers, as `downstream_*`.
    """
    dtype, devices = how.timed_in, devices_for(num_gpus)
    with quiet_transformers(), progress.stage("evaluate", len(folders) + 1, "step") as bar:
        answered = _answered(Models(folders, devices), folders[PARENT], batches, how, bar)
        scenarios = scenarios_of(folders, how.architecture, how.scenario)
        timed = Models({name: folder for name, folder in folders.items() if name != BEFORE}, devices, getattr(torch, dtype))
        together = _fit_together(timed, scenarios)
        timer = find_engine(how.engine if how.engine == "puzzle" and len(devices) == 1 else "torch")
        rates = _rates(timed, scenarios, how.config.repeats, together, timer)
        bar.advance()
    results = answered["models"]
    for name in folders:
        results[name] |= rates["child" if name == BEFORE and "child" in rates else name]
        results[name]["measured_speedup"] = results[name]["throughput_tokens_per_s"] / results[PARENT]["throughput_tokens_per_s"]
    by = f"{timer.name} on {_in_words(len(devices), timer.device_name(num_gpus > 0))}, {dtype}"
    return answered | _speedups(how.architecture, how.scenario) | {
        "measured_by": by,
        "timed": "alternately" if together else "one after the other: they do not fit into memory together",
        "measured_speedup": results["child"]["measured_speedup"] if "child" in results else None,
    }  # fmt: skip


def evaluate_in_shards(
    folders: Mapping[str, str], batches: Sequence[Tensor], how: Comparison, progress: Progress,
    layers_of: LayersOf, num_shards: int, device: torch.device = CPU,
) -> dict[str, Any]:  # fmt: skip
    """The same of models whose layers lie in so many shards: figures, samples and sizes.

    A speed is that of a whole model on one node, so none is measured: what `evaluate` says of speeds is None or missing, and
    `not_measured` says why.
    """
    with quiet_transformers(), progress.stage("evaluate", len(folders), "step") as bar:
        answered = _answered(ShardedModels(folders, layers_of, device), folders[PARENT], batches, how, bar)
    scenarios = scenarios_of(folders, how.architecture, how.scenario)
    for name, folder in folders.items():
        shape = model_without_weights(locate(folder), getattr(torch, how.timed_in))
        answered["models"][name] |= sizes_of(shape, scenarios[name]) | {"measured_speedup": None}
    why = f"not measured: the model is spread over {num_shards} shard{'s' * (num_shards > 1)}"
    return answered | _speedups(how.architecture, how.scenario) | {
        "measured_by": why,
        "timed": why,
        "not_measured": why,
        "measured_speedup": None,
    }  # fmt: skip


def _answered(models: Mapping[str, Any], parent: str, batches: Sequence[Tensor], how: Comparison, bar: Bar) -> dict[str, Any]:
    """What models predict, answer and write: `models`, `samples` and `prompt`."""
    config, tokenizer, samples = how.config, tokenizer_of(parent, how.trusted), {}

    def also(name: str, model: Any) -> Mapping[str, float]:
        samples[name] = greedy_sample(model, tokenizer, config.prompt, config.sample_tokens)
        bar.advance()
        found = answer_questions(model, how.questions).summary() if how.questions else {}
        return {f"downstream_{key}": value for key, value in found.items()}

    return {"models": predictions(models, batches, also, how.separator), "samples": samples, "prompt": config.prompt}


def scenarios_of(names: Iterable[str], architecture: Architecture | None, scenario: Scenario) -> dict[str, Scenario]:
    """The parent's is the scenario's own; a child has the batch size that its architecture was chosen for."""
    size = architecture.predicted.batch_size if architecture else scenario.batch_size
    return {name: scenario if name == PARENT else replace(scenario, batch_size=size) for name in names}


def _speedups(architecture: Architecture | None, scenario: Scenario) -> dict[str, Any]:
    """What was predicted, and of which scenario."""
    return {
        "scenario": asdict(scenario),
        "estimated": bool(architecture and architecture.estimated),
        "predicted": asdict(architecture.predicted) if architecture else None,
        "parent_predicted": asdict(architecture.parent_predicted) if architecture else None,
        "predicted_speedup": architecture.predicted_speedup if architecture else None,
    }


def _in_words(count: int, device: str) -> str:
    return device if count == 1 else f"{count} x {device}, one layer after the other"


def _fit_together(models: Models, scenarios: Mapping[str, Scenario]) -> bool:
    """Whether all models can be in memory at once, and the KV cache of any of them: by the headers of their files, and by their configs.
    True where nobody says what is free."""
    free = [available_bytes(device) for device in models.devices]
    if None in free:
        return True
    dtype = models.dtype or torch.float32
    folders = {name: locate(folder) for name, folder in models.folders.items()}
    num_values = sum(math.prod(shape) for folder in folders.values() for _, shape in Checkpoint(folder).headers.values())
    caches = [kv_cache_bytes(model_without_weights(folder, dtype), scenarios[name]) for name, folder in folders.items()]
    return ROOM * num_values * torch.finfo(dtype).bits // 8 + max(caches) <= sum(filter(None, free))


def _rates(
    models: Mapping[str, Any], scenarios: Mapping[str, Scenario], repeats: int, together: bool, engine: Engine
) -> dict[str, dict[str, float]]:
    """Measured rates, and sizes.

    Models of the same scenario are timed alternately, so that both see the same state of the machine, unless each is to be alone.
    """
    rates: dict[str, dict[str, float]] = {}
    groups: dict[Any, list[str]] = {}
    for name in models:
        groups.setdefault(scenarios[name] if together else name, []).append(name)
    for names in groups.values():
        loaded, scenario = {name: models[name] for name in names}, scenarios[names[0]]
        rates |= speeds(measure_side_by_side(loaded, scenario, repeats, engine), scenario)
        for name, model in loaded.items():
            rates[name] |= sizes_of(model, scenario)
        del loaded, model
    return rates


def sizes_of(model: Any, scenario: Scenario) -> dict[str, float]:
    """What is counted of a model, with or without weights, and measured by nobody."""
    memory_mib, num_params = model_memory_mib(model, scenario), float(model.num_parameters())
    return {"batch_size": float(scenario.batch_size), "memory_mib": memory_mib, "num_params": num_params}
