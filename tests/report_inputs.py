"""A run of all stages as the report gets it, with made-up figures."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from puzzle_ray.artifacts import (
    FIXED,
    KINDS,
    PARENT,
    Architecture,
    Costs,
    LayerChoice,
    LayerSpace,
    Profile,
    ProfileRow,
    Scenario,
    ScoreRow,
    Scores,
    SearchSpace,
)
from puzzle_ray.evaluation.tasks import TaskAnswers, compare_tasks
from puzzle_ray.report.page import ReportData, SweepPoint

LAYERS = 8
ATTENTION = (PARENT, "gqa:2", "gqa:1", "linear", "noop")
FFN = (PARENT, "ffn:384", "ffn:256", "ffn:128", "ffn:48", "linear", "noop")
SPACE = SearchSpace((LayerSpace(ATTENTION, FFN),) * LAYERS)
SCENARIO = Scenario(batch_size=16, input_tokens=256, output_tokens=32)
SHARE = {
    PARENT: 1.0, "gqa:2": 0.72, "gqa:1": 0.61, "linear": 0.2, "noop": 0.0,
    "ffn:384": 0.75, "ffn:256": 0.5, "ffn:128": 0.25, "ffn:48": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    layer: int
    kind: str
    variant: str
    initialisation: str
    start_loss: float
    final_loss: float
    kept: str
    tokens: int
    failure: str
    tokens_saved: int = 0
    singular_value: float = 0.4
    parent_singular_value: float = 0.39
    sensitivity: float = 2e-6
    parent_sensitivity: float = 1e-6


def _profile() -> Profile:
    rows = []
    whole = (("attention", ATTENTION, 11.3, 0.41, 98_304), ("ffn", FFN, 18.9, 0.33, 294_912))
    for kind, variants, prefill, decode, params in whole:
        for v in variants:
            s = SHARE[v]
            kv = {PARENT: 1024, "gqa:2": 512, "gqa:1": 256}.get(v, 0) if kind == "attention" else 0
            times = (prefill * s, decode * s, 0.1 * s, 0.004 * s)
            rows.append(ProfileRow("full_attention", kind, v, 16, 256, 32, *times, int(params * s) * 4, kv, int(params * s)))
    rows.append(ProfileRow("", FIXED, FIXED, 16, 256, 32, 21.7, 0.9, 0.3, 0.01, 4 * 786_432, 0, 786_432))
    return Profile(tuple(rows), "torch", "2.13.0", "AMD EPYC (2 cores)", "float32")


PROFILE = _profile()


def _scores() -> Scores:
    rows = []
    for layer, kind, variant in SPACE.subblocks():
        choice = LayerChoice(attention=variant) if kind == "attention" else LayerChoice(ffn=variant)
        value = (1.02 - SHARE[variant]) ** 2 * (0.04 + 0.03 * abs(layer - 3.6)) * (1.5 if kind == "ffn" else 0.8)
        rows.append(ScoreRow(layer, choice.attention, choice.ffn, "kl", value, value / 20, 8192))
    return Scores(tuple(rows), "subblock")


SCORES = _scores()


def _costs(choices: tuple[LayerChoice, ...]) -> Costs:
    rows = [PROFILE.row("full_attention", kind, c.variant(kind), 16) for c in choices for kind in KINDS] + [PROFILE.fixed(16)]
    prefill, decode = sum(r.prefill_ms for r in rows), sum(r.decode_ms for r in rows)
    runtime = prefill + 31 * decode
    memory = sum(r.weight_bytes + 16 * 288 * r.kv_bytes_per_token for r in rows) / 2**20
    return Costs(16, prefill, decode, runtime, 16 * 288 / runtime * 1000, memory, sum(r.num_params for r in rows))


def _architecture(*choices: LayerChoice, **limits: float) -> Architecture:
    objective = sum(SCORES.value(i, c, "kl") for i, c in enumerate(choices))
    parent = _costs((LayerChoice(),) * LAYERS)
    return Architecture(choices, "mip", objective, objective, "optimal", 0.083, _costs(choices), parent, limits)


CHOSEN = _architecture(
    LayerChoice(PARENT, "ffn:384"), LayerChoice("gqa:2", "ffn:384"), LayerChoice("gqa:2", "ffn:256"),
    LayerChoice("linear", "ffn:128"), LayerChoice("gqa:1", "linear"), LayerChoice("noop", "ffn:256"),
    LayerChoice("gqa:2", PARENT), LayerChoice(), speedup=1.5,
)  # fmt: skip
SWEEP = (
    SweepPoint(1.1, _architecture(*[LayerChoice("gqa:2", "ffn:384")] * 3, *[LayerChoice()] * 5)),
    SweepPoint(1.25, _architecture(*[LayerChoice("gqa:2", "ffn:384")] * 6, *[LayerChoice()] * 2)),
    SweepPoint(1.5, CHOSEN),
    SweepPoint(2.0, _architecture(*[LayerChoice("gqa:1", "ffn:128")] * 6, *[LayerChoice("gqa:2", "ffn:384")] * 2)),
    SweepPoint(9.0, None, "no architecture in this search space meets speedup >= 9; the best reachable is 7.4"),
)


def _measured(origin: str, ffn: str, kl: float, **more: object) -> dict[str, object]:
    """A child that is on no frontier."""
    choices = [LayerChoice("noop", ffn)] * LAYERS
    predicted = _architecture(*choices).objective
    return {"origin": origin, "predicted": predicted, "kl": kl, "stderr": 0.004, **more, "choices": [c.label for c in choices]}


_CANDIDATES = [
    _measured("mip", "ffn:384", 0.541),
    _measured("mip #2", "ffn:128", 0.892),
    _measured("mip, corrected", "ffn:256", 0.687, predicted_corrected=0.6173),
]
PICK = {
    "metric": "kl", "tokens": 8192, "picked": _CANDIDATES[0], "candidates": _CANDIDATES, "local_search": [],
    "left_out": {}, "prediction": {"mean_predicted_over_measured": 0.9, "rank_correlation": 0.5}, "interactions": [],
}  # fmt: skip
PAIRS = [
    {
        "a": "layer 3: linear + ffn:128",
        "b": "layer 4: gqa:1 + linear",
        "kl_a": 0.1234,
        "kl_b": 0.2345,
        "kl_both": 0.4321,
        "interaction": 0.0742,
    }
]
_TEXT = {"where": "data.train[0]", "left_out": [], "dropped_rows": 0}
TEXT_SOURCES = (
    _TEXT | {"name": "train", "source": "books/<b>.txt", "weight": 3.0, "documents": 1200, "times_read": 0, "share": 0.751,
             "tokens": {"train": 700_000, "heldout": 51_000}},
    _TEXT | {"name": "train", "source": "org/wiki", "weight": 1.0, "documents": 340, "times_read": 2, "share": 0.249,
             "tokens": {"train": 240_000, "heldout": 9_000}, "dropped_rows": 17, "left_out": ["README.md"]},
)  # fmt: skip
SAMPLE = "Once upon a time, there was a little girl named Lily. She <script>alert('x')</script> & smiled.\nThe end."


def _decay(start: float, end: float, steps: int) -> list[float]:
    return [end + (start - end) * math.exp(-6 * i / steps) * (1 + 0.05 * math.sin(i)) for i in range(steps)]


def _figures(costs: Costs, slower: float) -> dict[str, float]:
    """What an evaluation would have measured, had everything been that much slower than predicted."""
    prefill_ms, decode_ms, runtime_ms = slower * costs.prefill_ms, slower * costs.decode_ms, slower * costs.runtime_ms
    return {
        "prefill_ms": prefill_ms, "decode_ms": decode_ms, "runtime_ms": runtime_ms,
        "prefill_tokens_per_s": 16 * 256 / prefill_ms * 1000, "decode_tokens_per_s": 16 / decode_ms * 1000,
        "throughput_tokens_per_s": 16 * 288 / runtime_ms * 1000, "memory_mib": costs.memory_mib, "num_params": costs.num_params,
        "measured_speedup": CHOSEN.parent_predicted.runtime_ms * 1.031 / runtime_ms,
    }  # fmt: skip


def _quality() -> dict:
    """What models answered: made-up values, compared as real ones are."""
    rng = np.random.default_rng(0)
    parent = {"a": (rng.random(200) < 0.6).astype(float).tolist(), "b": (rng.random(90) < 0.3).astype(float).tolist()}
    models = {}
    for name, share in (("parent", 0.0), ("child_before_gkd", 0.3), ("child", 0.1)):
        own = {task: [v if rng.random() > share else float(rng.random() < 0.25) for v in of] for task, of in parent.items()}
        values = {task: {"acc_norm,none": of} for task, of in own.items()}
        models[name] = TaskAnswers(values, {task: {"acc_norm,none": sum(of) / len(of)} for task, of in own.items()})
    tasks = compare_tasks({"next_sentence_mc": ["a"], "arc_easy": ["b"]}, models, {"a": 0.25, "b": 0.25}, 0, 500, 0.95)
    figures = {name: {"loss": 2.4, "perplexity": 11.0, "agreement": 0.87} for name in models}
    found = {name: {"recall": 0.6, "choice": 0.75} for name in models}
    sample = {
        "prompt": "Once upon a time",
        "text": "",
        "models": {name: SAMPLE.removeprefix("Once upon a time") for name in models},
    }
    sample["models"]["child"] = sample["models"]["child"].replace("Lily", "Anna")
    sample["same_tokens"] = {"parent": 48, "child_before_gkd": 48, "child": 9}
    return {
        "tasks": tasks | {"half": "test", "limit": None, "num_fewshot": 5, "lm_eval": "0.4.13"},
        "by_position": [{"bucket": "1 to 15", "tokens": 4096, "models": figures}],
        "by_document_length": [{"bucket": "65 to 128", "tokens": 4096, "models": figures}],
        "by_frequency": [{"bucket": "at least 1 %", "tokens": 4096, "models": figures}],
        "retrieval": [{"kind": "single", "tokens": 4096, "depth": d, "questions": 5, "models": found} for d in (None, 0.5)],
        "samples": [sample, sample | {"text": " and a text"}],
    }


WHY_UNTIMED = "not measured: the model is spread over 5 shards"


def untimed(evaluation: dict) -> dict:
    """The same of models that no node holds: what a whole model's speed would say is not there."""
    models = {
        name: {k: v for k, v in own.items() if not k.endswith(("_ms", "_per_s"))} | {"measured_speedup": None}
        for name, own in evaluation["models"].items()
    }
    found = {"models": models, "measured_speedup": None, "not_measured": WHY_UNTIMED, "measured_by": WHY_UNTIMED}
    return evaluation | found


def whole_run() -> ReportData:
    """Everything a run of all stages has."""
    library, curves = [], {}
    for layer, kind, variant in SPACE.subblocks():
        start = (1.05 - SHARE[variant]) * (0.3 + 0.05 * layer)
        trained = variant != "noop"
        how = {"g": "mean-pooled heads", "f": "channel contribution", "l": "least squares", "n": "nothing"}[variant[0]]
        kept = "trained" if trained else "start"
        library.append(Trained(layer, kind, variant, how, start, start * (0.4 if trained else 1), kept, 65_536 * trained, ""))
        curves[layer, kind, variant] = _decay(start, 0.4 * start, 128) if trained else []
    parent = _figures(CHOSEN.parent_predicted, 1.031) | {"heldout_loss": 2.391, "kl": 0.0, "top1_agreement": 1.0}
    child = _figures(CHOSEN.predicted, 1.037) | {"heldout_loss": 2.448, "kl": 0.0874, "top1_agreement": 0.871}
    evaluation = {
        "models": {
            "parent": parent,
            "child_before_gkd": child | {"heldout_loss": 2.913, "kl": 0.541, "top1_agreement": 0.644},
            "child": child,
        },
        "predicted_speedup": CHOSEN.predicted_speedup,
        "measured_speedup": parent["runtime_ms"] / child["runtime_ms"],
        "heldout": {"score": "0 to 31 of 100", "pick": "32 to 79 of 100", "test": "80 to 99 of 100"},
        "prompt": "Once upon a time",
        "samples": {"parent": SAMPLE.replace("Lily", "Anna"), "child": SAMPLE},
    }
    gkd = [{"step": 10 * i, "loss": kl + cosine, "kl": kl, "cosine": cosine}
           for i, (kl, cosine) in enumerate(zip(_decay(0.54, 0.08, 60), _decay(0.12, 0.04, 60), strict=True))]  # fmt: skip
    return ReportData(
        "tiny-llama-8x192", scenario=SCENARIO, num_key_value_heads=4, intermediate_size=512, space=SPACE, profile=PROFILE,
        scores=SCORES, architecture=CHOSEN, sweep=SWEEP, library=library, bld_curves=curves, evaluation=evaluation, gkd_curve=gkd,
        quality=_quality(), text_sources=TEXT_SOURCES, picked=PICK,
        stage_seconds={"library": 142.0, "profile": 18.4, "score": 25.1, "search": 0.3, "gkd": 96.0, "evaluate": 12.7},
        config_yaml="parent: tiny\nsearch:\n  limits: {speedup: 1.5}  # <b>not bold</b>\n",
        versions={"puzzle_ray": "0.1.0", "torch": "2.13.0"}, machine={"cores": 2, "memory": "8 GiB"},
    )  # fmt: skip


def measured_run() -> ReportData:
    """A run whose sweep was measured, before and after GKD."""
    kl = (0.021, 0.055, 0.0874, 0.31, None)
    points = [replace(p, measured_kl=x, distilled_kl=x and 0.4 * x) for p, x in zip(SWEEP, kl, strict=True)]
    return replace(whole_run(), sweep=points)
