"""The model card of a child: what its layers are, how large it is, how it was made, and how it is loaded.

The card is made from `puzzle_ray.json` beside it, which goes with the child from stage to stage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.models.checkpoint import Checkpoint, read_json
from puzzle_ray.version import __version__

HISTORY = "puzzle_ray.json"
CARD = "README.md"


def add_card(child: Any, source: Path, folder: Path, made: Mapping[str, object] | None) -> None:
    """Writes history and card into `folder`. `source` is the folder of the parent, or of the child that this one was before."""
    before = source / HISTORY
    history = read_json(before) if before.is_file() else {"parent_params": _stored_params(source), "made": []}
    if made is not None:
        history["made"] = [*history["made"], dict(made)]
        history.pop("evaluation", None)  # it was of the weights before this step
    history |= {"version": __version__, "params": int(child.num_parameters())}
    _write(child.config, folder, history)


def add_evaluation(config: Any, folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Adds what was measured of a child to history and card in `folder`. `config`: the child's. `evaluation`: `evaluation_facts`."""
    _write(config, folder, read_json(folder / HISTORY) | {"evaluation": dict(evaluation)})


def evaluation_facts(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What of an evaluation (`evaluation.json` of a run) belongs on the card of the child that is called `name` there."""
    models = {"parent": found["models"]["parent"], "child": found["models"][name]}
    kept = {each: {key: values[key] for key, *_ in _FIGURES if values.get(key) is not None} for each, values in models.items()}
    return {"models": kept, "scenario": found["scenario"], "measured_by": found["measured_by"]}


def _write(config: Any, folder: Path, history: Mapping[str, Any]) -> None:
    (folder / HISTORY).write_text(json.dumps(history, indent=1) + "\n")
    choices = [LayerChoice(**layer) for layer in config.puzzle_layers]
    (folder / CARD).write_text(card(config, choices, history))


def _stored_params(folder: Path) -> int | None:
    checkpoint = Checkpoint(folder)
    return sum(math.prod(shape) for _, shape in checkpoint.headers.values()) if checkpoint.present else None


def card(config: Any, choices: Sequence[LayerChoice], history: Mapping[str, Any]) -> str:
    """The text of the card."""
    family = str(config.model_type).removeprefix("puzzle_")
    parent, own = history["parent_params"], history["params"]
    whole = f", {own / parent:.1%} of its parent's {parent:,}" if parent else ""
    steps = [", ".join(f"{key}: {value}" for key, value in step.items()) for step in history["made"]]
    alone = "auto_map" in config.to_dict()
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [puzzle_ray]",
        "---",
        "# A child made by puzzle_ray",
        "",
        f"Made from a parent of the family `{family}` by [Puzzle](https://arxiv.org/abs/2411.19146), puzzle_ray {history['version']}.",
        f"It has {own:,} parameters{whole}.",
        "",
        "## Layers",
        "| layers | attention | FFN |",
        "|---|---|---|",
        *(f"| {where} | {choice.attention} | {choice.ffn} |" for where, choice in _runs(choices)),
        "",
        "`parent` is the parent's own; `gqa:N` has N key-value heads, `ffn:N` N channels, `linear` is a matrix and `noop` nothing.",
        "",
        *(["## How it was made", *(f"{number}. {step}" for number, step in enumerate(steps, 1)), ""] if steps else []),
        *_evaluation(history.get("evaluation")),
        "## Loading it",
        *(_LOADING if alone else _LOADING_WITH_PACKAGE),
    ]
    return "\n".join(lines) + "\n"


_FIGURES = (
    ("heldout_loss", "held-out loss, nats a token", "{:.4f}"),
    ("kl", "KL to the parent, nats a token", "{:.4f}"),
    ("top1_agreement", "likeliest token is the parent's", "{:.1%}"),
    ("downstream_accuracy", "questions right", "{:.1%}"),
    ("throughput_tokens_per_s", "tokens/s", "{:.0f}"),
    ("batch_size", "at a batch of", "{:.0f}"),
    ("memory_mib", "weights and cache, MiB", "{:.1f}"),
    ("heldout_tokens", "held-out tokens", "{:.0f}"),
)


def _evaluation(found: Mapping[str, Any] | None) -> list[str]:
    """The section about what was measured; nothing where nothing was."""
    if found is None:
        return []
    models, scenario = found["models"], found["scenario"]
    rows = [
        "| " + " | ".join([title, *(form.format(models[name][key]) for name in ("parent", "child"))]) + " |"
        for key, title, form in _FIGURES
        if all(key in models[name] for name in ("parent", "child"))
    ]
    timed = "throughput_tokens_per_s" in models["parent"]
    requests = f"{scenario['input_tokens']} tokens of prompt and {scenario['output_tokens']} of answer, "
    how = f"{requests if timed else ''}{found['measured_by']}"
    return ["## Evaluation", "| | parent | child |", "|---|---|---|", *rows, "", f"Speed: {how}.", ""]


_LOADING = (
    "```python",
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    "model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)  # the code in this folder",
    "tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)  # which reads the model's config",
    "```",
    "After `import puzzle_ray`, transformers loads it without `trust_remote_code`. vLLM serves it through its Transformers backend:",
    "`vllm serve FOLDER --trust-remote-code`.",
)
_LOADING_WITH_PACKAGE = (
    "Some of its layers are variants of another package. So it loads where that package and puzzle_ray are installed, after",
    "`import puzzle_ray`, with `AutoModelForCausalLM.from_pretrained(FOLDER)`.",
)


def _runs(choices: Sequence[LayerChoice]) -> list[tuple[str, LayerChoice]]:
    """Equal layers behind one another, as one row."""
    rows: list[tuple[int, int, LayerChoice]] = []
    for index, choice in enumerate(choices):
        if rows and rows[-1][2] == choice:
            rows[-1] = (rows[-1][0], index, choice)
        else:
            rows.append((index, index, choice))
    return [(str(a) if a == b else f"{a}-{b}", choice) for a, b, choice in rows]
