"""Evaluation: held-out predictions and measured speed of the parent and its children, in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from puzzle_ray.artifacts import Architecture, Scenario
from puzzle_ray.evaluation.settings import EvaluateConfig
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import load_model, quiet_transformers
from puzzle_ray.models.tokenizer import read_tokenizer
from puzzle_ray.profiling.engine import Timing, measure_side_by_side
from puzzle_ray.profiling.engines.torch_engine import ENGINE
from puzzle_ray.profiling.memory import model_memory_mib
from puzzle_ray.progress import Progress
from puzzle_ray.scoring.downstream import QuestionBatch, answer_questions
from puzzle_ray.scoring.metrics import PredictionMetrics, compare_predictions, mean

PARENT = "parent"


@torch.inference_mode()
def predictions(models: Mapping[str, Any], batches: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """Held-out loss, KL(parent || model) and top-1 agreement of every model, in nats per token. `parent` must be among the models."""
    parts: dict[str, list[PredictionMetrics]] = {name: [] for name in models}
    for ids in batches:
        reference = F.log_softmax(models[PARENT](ids, use_cache=False).logits.float(), dim=-1)
        for name, model in models.items():
            logits = reference if name == PARENT else model(ids, use_cache=False).logits
            parts[name].append(compare_predictions(reference, logits, ids))
    out = {}
    for name, of_batches in parts.items():
        joined = PredictionMetrics.joined(of_batches)
        out[name] = {
            "heldout_loss": mean(joined.lm_loss),
            "kl": mean(joined.kl),
            "top1_agreement": mean(joined.top1_agreement),
            "heldout_tokens": float(joined.tokens),
        }
    return out


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


@torch.inference_mode()
def greedy_sample(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """The prompt and its greedy continuation. The beginning-of-sequence token, if the tokenizer has one, comes first."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], dim=1)
    ids = ids.to(model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def evaluate(
    folders: Mapping[str, str],
    batches: Sequence[Tensor],
    architecture: Architecture | None,
    scenario: Scenario,
    config: EvaluateConfig,
    dtype: str,
    progress: Progress,
    use_gpu: bool = False,
    questions: Sequence[QuestionBatch] = (),
) -> dict[str, Any]:
    """Evaluates the named models (`parent`, `child_before_gkd`, `child`, ...), measured alternately in the same run.

    The parent is timed at the scenario's batch size, children at the batch size that their architecture was chosen for. The torch
    engine times them, in bfloat16 where `dtype` is fp8. Returns JSON-able `models`, `samples` and `scenario`, and the predicted and the
    measured speed-up, both ratios of throughputs. `estimated` says that the prediction was computed from a profile without
    measurements. With `questions`, every model also has its accuracy and the other measures of its answers, as `downstream_*`.
    """
    dtype = "bfloat16" if dtype == "fp8" else dtype
    tokenizer = read_tokenizer(locate(folders[PARENT]))
    device = torch.device("cuda" if use_gpu else "cpu")
    with quiet_transformers(), progress.stage("evaluate", 3, "step") as bar:
        models = {name: load_model(folder, torch.float32).to(device) for name, folder in folders.items()}
        results = predictions(models, [ids.to(device) for ids in batches])
        if questions:
            for name, model in models.items():
                results[name] |= {
                    f"downstream_{key}": value for key, value in answer_questions(model, questions).summary().items()
                }
        bar.advance()
        samples = {name: greedy_sample(m, tokenizer, config.prompt, config.sample_tokens) for name, m in models.items()}
        bar.advance()
        if dtype != "float32":
            models = {name: model.to(getattr(torch, dtype)) for name, model in models.items()}
        size = architecture.predicted.batch_size if architecture else scenario.batch_size
        scenarios = {name: scenario if name == PARENT else replace(scenario, batch_size=size) for name in models}
        timed = {name: model for name, model in models.items() if name != "child_before_gkd"}  # same shapes as the child
        rates = _rates(timed, scenarios, config.repeats)
        bar.advance()
    for name, model in models.items():
        same_shape = "child" if name == "child_before_gkd" and "child" in rates else name
        results[name] |= rates[same_shape]
        results[name]["batch_size"] = float(scenarios[name].batch_size)
        results[name]["memory_mib"] = model_memory_mib(model, scenarios[name])
        results[name]["num_params"] = float(model.num_parameters())
        results[name]["measured_speedup"] = (
            rates[same_shape]["throughput_tokens_per_s"] / rates[PARENT]["throughput_tokens_per_s"]
        )
    return {
        "models": results,
        "samples": samples,
        "prompt": config.prompt,
        "scenario": asdict(scenario),
        "measured_by": f"{ENGINE.name} on {ENGINE.device_name(use_gpu)}, {dtype}",
        "estimated": bool(architecture and architecture.estimated),
        "predicted": asdict(architecture.predicted) if architecture else None,
        "parent_predicted": asdict(architecture.parent_predicted) if architecture else None,
        "predicted_speedup": architecture.predicted_speedup if architecture else None,
        "measured_speedup": results["child"]["measured_speedup"] if "child" in results else None,
    }


def _rates(models: Mapping[str, Any], scenarios: Mapping[str, Scenario], repeats: int) -> dict[str, dict[str, float]]:
    """Measured rates. Models of the same scenario are timed alternately, so that both see the same state of the machine."""
    rates: dict[str, dict[str, float]] = {}
    for scenario in dict.fromkeys(scenarios[name] for name in models):
        together = {name: model for name, model in models.items() if scenarios[name] == scenario}
        rates |= speeds(measure_side_by_side(together, scenario, repeats), scenario)
    return rates
