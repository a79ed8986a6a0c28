"""The configuration reference, generated from the sections of the settings: names, defaults, allowed values, and what their authors wrote.

A setting's meaning is the comment beside it in the source, else what stands here, else what its section's docstring says
of it.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, get_args

from pydantic import BaseModel

from puzzle_ray.config import RunConfig
from puzzle_ray.profiling.scenarios import NAMED_SCENARIOS
from puzzle_ray.version import __version__

LARGE = 2**60  # a maximum beyond it is there for computers

# What a user wants -> the settings that give it, as `--set` takes them. A test loads each.
AIMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("twice the parent's throughput", ("search.limits.speedup=2",)),
    ("at most so many parameters", ("search.limits.params=4000000000",)),
    ("half the KV cache", ("search.limits.kv_heads=128", "profile.scenario=long_context")),
    ("a first token within 200 ms, a token every 20 ms", ("search.limits.prefill_ms=200", "search.limits.decode_ms=20")),
    ("what fits on a card, at the best batch size", ("profile.memory_mib=24000", "profile.scenario.batch_size=auto")),
    ("speeds as `serve-child` has them", ("profile.engine=puzzle",)),
    ("a plan for hardware one does not have", ("profile.engine=roofline", "profile.device=H100")),
    ("many budgets at once, measured", ("search.sweep={speedup: [1.25, 1.5, 2]}", "search.sweep_measure=true")),
    ("layers that stay as they are", ("search.limits.speedup=1.5", "search.limits.fixed={0: {attention: parent, ffn: parent}}")),
    ("the pick by measured KL", ("search.candidates=8", "search.local_search_steps=20")),
    ("the pick by what distils best", ("search.candidates=3", "search.without=[linear]", "search.distil_tokens=50000")),
    ("the pick by a race to a better child", ("search.candidates=3", "search.rivals=[greedy]", "search.race_rungs=3")),
    ("blocks judged by a task of one's own", ("scoring.downstream=questions.jsonl", "scoring.metric=downstream")),
    ("fewer exact scores", ("scoring.shortlist=fisher", "scoring.shortlist_keep=0.2")),
    (
        "three parts of one text to one of another",
        ("data.train=[{source: org/web, config_name: en, weight: 3}, {source: code.jsonl}]",),
    ),
    ("documents that do not see each other", ("data.document_mask=true",)),
    ("a first look in little time", ("library.tokens=1000000", "gkd.tokens=0", "search.candidates=1")),
    ("a better child", ("library.tokens=1000000000", "gkd.tokens=5000000000")),
    (
        "less memory in the object store",
        ("library.window=2", "library.activation_dtype=bfloat16", "cluster.num_shards=4"),
    ),
    ("settings by the hardware that is there", ("hardware=auto",)),
    ("shards and trainers on GPUs", ("cluster.gpus_per_shard=0.5", "cluster.gpus_per_trainer=0.25")),
    ("more trainers than layers", ("cluster.trainers_per_layer=4",)),
    ("larger batches than fit a trainer", ("library.gradient_accumulation=8",)),
    ("an evaluation of what no node holds", ("evaluate.num_shards=16", "cluster.gpus_per_shard=1")),
    ("GKD on eight GPUs", ("gkd.use_gpu=true", "gkd.num_workers=8")),
    (
        "GKD of a child that one GPU cannot hold",
        ("gkd.use_gpu=true", "gkd.num_workers=8", "gkd.parallel=fsdp", "gkd.activation_checkpointing=true"),
    ),
    ("profiles of one kind of GPU", ("profile.num_gpus=1", "profile.label_selector={ray.io/accelerator-type: H100}")),
    ("nodes that are added on demand", ("cluster.autoscaling=true", "cluster.placement_timeout_s=1800")),
    (
        "nodes that are taken away",
        ("library.checkpoint_every=20", "gkd.checkpoint_every=20", "cluster.max_recoveries=200", "gkd.max_failures=-1"),
    ),
)

# Of settings whose names say it to those who know the field.
MEANINGS: Mapping[str, str] = {
    "revision": "branch, tag or commit of a parent that is a hub id",
    "hardware": "auto, or a cluster in words, such as `8x8 H100-80GB`: it decides what is not set; `config --resolved` shows what",
    "store": "where artifacts are kept: a folder or any fsspec URL; a part of a result is never read from elsewhere",
    "seed": "of the order of training text and of everything that draws",
    "data.train": "the text that is trained on: a source, or a list of sources; the tiny parent brings its own",
    "data.heldout_fraction": "share of the training documents that is held out where `data.heldout` names none",
    "data.sequence_length": "tokens of a training sequence",
    "data.max_heldout_tokens": "what is read of held-out text at the most",
    "space.attention": "attention variants of every layer",
    "space.ffn": "FFN variants of every layer",
    "library.mode": "which variants are trained: halves beside the parent's other half, or whole pairs",
    "library.loss": "weights of the terms that a variant minimises",
    "library.weight_decay": "of AdamW",
    "library.tokens": "that every variant is trained on",
    "library.calibration_tokens": "for the statistics that variants start from; auto: 16384, and at least 4 for each FFN channel",
    "library.validation_tokens": "that losses before and after are measured on; never trained on",
    "library.micro_batch_tokens": "of one forward pass, a multiple of `data.sequence_length`",
    "library.learning_rate": "at its peak; a linear warm-up, then a cosine to a tenth; auto: each variant finds its own by short trials",
    "library.warmup_fraction": "share of the steps",
    "library.gradient_clip": "largest norm of a variant's gradient",
    "profile.scenario": "the load that costs are of; a batch size may be `auto`",
    "profile.dtype": "of weights and KV cache",
    "profile.request_ms": "what HTTP adds to a request of the server, for parent and child alike",
    "profile.repeats": "timings of every stack; the median counts",
    "profile.num_profilers": "that measure at the same time, each alone on its device",
    "profile.num_gpus": "GPUs of a node that a profiler asks for; whole models are evaluated over all of them",
    "profile.resources": 'Ray resources that a profiler asks for, to pin it to nodes, e.g. {"accelerator_type:H100": 0.001}',
    "profile.label_selector": "labels that a profiler's node must have, e.g. {ray.io/accelerator-type: H100}",
    "scoring.granularity": "subblock: halves are scored alone and added; block: pairs are scored",
    "scoring.tokens": "held-out tokens that every replacement is scored on",
    "scoring.micro_batch_tokens": "of one forward pass",
    "scoring.downstream_questions": "at the most; half of them score blocks",
    "search.limits": "the budget: all of its limits hold at once",
    "search.limits.throughput_tokens_per_s": "input and output tokens per second, at least",
    "search.limits.latency_fraction": "share of the parent's latency",
    "search.limits.memory_fraction": "share of the parent's memory",
    "search.limits.params_fraction": "share of the parent's parameters",
    "search.limits.at_least": "minimums of costs, by their names",
    "search.limits.fixed.attention": "variant that a layer must have",
    "search.limits.fixed.ffn": "variant that a layer must have",
    "search.searcher": "mip, or another one of `puzzle_ray/search/searchers`, or package.module:ATTRIBUTE",
    "search.target_format": "`nemotron_nas`: only what vLLM runs in that format; `native`: all of the search space",
    "search.candidates": "how many of the search's best answers are measured as whole children; 1: none, and the best one is taken",
    "search.min_different_layers": "layers in which any two of the candidates differ, at least",
    "search.rivals": "searchers of which one answer each is measured where sums of scores say little, or races",
    "search.corrections": "answers, at the most, to scores that are corrected by what was measured; they are measured, too",
    "search.without": "families of variants; the best answer without each is measured, too, or races",
    "search.distil_tokens": "that every candidate is distilled by before one is picked; 0: none is",
    "search.race_rungs": "pauses of a race of distillations, after each of which the best third goes on; 0: no race",
    "search.race_own": "of the searcher's own answers, those of least KL, that race",
    "search.race_within": "none races whose KL before distillation is above so many times the least",
    "search.local_search_steps": "exchanges of blocks that lower the measured KL, at the most; 0: no local search",
    "search.measure_tokens": "held-out tokens that whole children are measured on",
    "search.sweep_gkd": "whether the architectures on the frontier are distilled and measured",
    "search.sweep_rungs": "pauses at which hopeless children of a sweep end; 1: none ends early",
    "search.time_limit_s": "of one solve",
    "gkd.tokens": "of the whole training, over all workers; 0: no GKD",
    "gkd.preset": "a mix of LM, KLD and cosine loss, each of weight 1; weights that are set go on top; null: the weights below",
    "gkd.stages": "lengths to train on, one after the other, in place of `tokens` and `micro_batch_tokens`",
    "gkd.stages.sequence_length": "tokens of a sequence in this stage",
    "gkd.stages.tokens": "of this stage, over all workers",
    "gkd.num_workers": "processes that share a step, a micro-batch each",
    "gkd.learning_rate": "at its peak",
    "gkd.warmup_fraction": "share of the steps",
    "gkd.weight_decay": "of AdamW",
    "gkd.gradient_clip": "largest norm of the gradient",
    "gkd.average_weights": "the rate stays at its peak, and the running average of the weights is watched and published",
    "gkd.kl_weight": "of the KL between the parent's and the child's tokens",
    "gkd.cosine_weight": "of the cosine distance between hidden states",
    "gkd.lm_weight": "of the loss on the next token",
    "gkd.cosine_reduction": "over layers: `sum` as in the paper, or `mean`, whose weight means the same for every depth",
    "gkd.lm_tokens": "the tokens whose next-token loss counts; null: all",
    "gkd.lm_tokens.after": "text that an answer begins behind, such as a chat template's `<|assistant|>`; only answers count",
    "gkd.lm_tokens.until": "text that an answer ends with, such as `<|end|>`",
    "gkd.use_gpu": "each worker has a GPU",
    "evaluate.prompt": "that parent and child continue, for the report",
    "cluster.connect_timeout_s": "until a cluster's address answers",
    "cluster.placement_timeout_s": "until what is asked of the cluster is placed",
    "cluster.num_shards": "runs of the parent's layers, each in a process of its own",
    "cluster.blocks_per_trainer": "layers that one trainer trains; auto: as few as there are cores or GPUs for",
    "cluster.cpus_per_trainer": "cores, and threads, of a trainer",
    "cluster.gpus_per_trainer": "share of a GPU; 0: trainers compute on the CPU",
    "cluster.gpus_per_shard": "share of a GPU; 0: shards compute on the CPU",
    "cluster.max_recoveries": "deaths of trainers between two checkpoints",
}
REQUIRED = "to be set"  # in a list of such settings there is no default


@dataclass(frozen=True)
class Setting:
    """One setting: its dotted name, and in words its default, what it may be, and what it means."""

    name: str
    default: str
    values: str
    meaning: str


@dataclass(frozen=True)
class SectionText:
    """One section: its name (empty for the settings of the run itself), its docstring, its settings."""

    name: str
    about: str
    settings: tuple[Setting, ...]


def sections() -> list[SectionText]:
    """All settings, the run's own first."""
    own = {name: field for name, field in RunConfig.model_fields.items() if _section(field.annotation) is None}
    found = [SectionText("", "", tuple(_settings(RunConfig, "", own)))]
    for name, field in RunConfig.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            about = inspect.cleandoc(section.__doc__ or "")
            found.append(SectionText(name, about, tuple(_settings(section, f"{name}.", section.model_fields))))
    return found


def reference() -> str:
    """The whole reference in Markdown."""
    lines = [
        f"# Settings of puzzle_ray {__version__}",
        "",
        "Generated by `puzzle-ray config --markdown`. Write settings in a YAML file for `--config`, or one by one with `--set",
        "section.key=value`; a recipe, a file and `--set` are laid on top of each other. Unknown names are refused.",
        "",
        "## Which setting for which aim",
        "",
        "| aim | settings |",
        "|---|---|",
        *(f"| {aim} | {'<br>'.join(f'`{_cell(setting)}`' for setting in settings)} |" for aim, settings in AIMS),
    ]
    for section in sections():
        lines += ["", f"## {section.name}" if section.name else "## The run", ""]
        lines += [section.about, ""] if section.about else []
        lines += ["| setting | default | values | meaning |", "|---|---|---|---|"]
        lines += [f"| `{s.name}` | `{_cell(s.default)}` | {_cell(s.values)} | {_cell(s.meaning)} |" for s in section.settings]
    return "\n".join(lines) + "\n"


def _settings(section: type[BaseModel], prefix: str, fields: Mapping[str, Any]) -> Iterator[Setting]:
    """A section's settings; those of a section within it stand behind it with dotted names."""
    schema = section.model_json_schema()
    comments, about = _comments(section), inspect.cleandoc(section.__doc__ or "")
    for name, field in fields.items():
        inner = _section(field.annotation)
        default = REQUIRED if field.is_required() else json.dumps(_plain(field.get_default(call_default_factory=True)))
        meaning = comments.get(name) or MEANINGS.get(f"{prefix}{name}") or _said_of(name, about)
        yield Setting(f"{prefix}{name}", default, _values(schema["properties"][name], schema), meaning)
        if inner is not None:
            yield from _settings(inner, f"{prefix}{name}.", inner.model_fields)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: plain for name in type(value).model_fields if (plain := _plain(getattr(value, name))) not in (None, {}, [])}
    if is_dataclass(value):
        fields = {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
        return {name: plain for name, plain in fields.items() if plain not in (None, [], ())}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a setting holds, also where it may be left out."""
    found = [x for x in (annotation, *get_args(annotation)) if isinstance(x, type) and issubclass(x, BaseModel)]
    return found[0] if found else None


def _values(schema: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    """What a setting may be, from its JSON schema."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name != "Scenario":
            return "settings of its own"
        names = ", ".join(f"`{name}`" for name in NAMED_SCENARIOS)
        return f"{names}; or `{{batch_size, input_tokens, output_tokens}}`; or `{{batch_size, lengths}}`"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_values(option, whole) for option in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return ("whole number" if kind == "integer" else "number") + _bounds(schema)
    if kind == "array":
        return f"list of {_values(schema.get('items', {}), whole)}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"names with {_values(inner, whole)}" if isinstance(inner, Mapping) else "names with values"
    return {"string": "text", "boolean": "`true`, `false`", "null": "`null`"}.get(str(kind), "any")


def _bounds(schema: Mapping[str, Any]) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    said = [f"{word} {schema[name]:g}" for name, word in words.items() if abs(schema.get(name, LARGE)) < LARGE]
    return f" {' '.join(said)}" if said else ""


def _comments(section: type[BaseModel]) -> dict[str, str]:
    """Field -> the comments on its lines."""
    source = textwrap.dedent(inspect.getsource(section))
    by_line: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and "noqa" not in token.string:
            by_line[token.start[0]] = token.string.lstrip("# ").strip()
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found[node.target.id] = " ".join(by_line[line] for line in lines if line in by_line)
    return found


def _said_of(name: str, about: str) -> str:
    """The sentences of a docstring that name a setting: `name` in backticks."""
    text = re.sub(r"(?m)^- ", "", about)
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z`])", " ".join(text.split()))
    return " ".join(sentence for sentence in sentences if re.search(rf"`{name}`", sentence))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
