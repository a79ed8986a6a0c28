"""All settings of a run, one model per stage. YAML + `--set a.b=c` on top; unknown keys are refused with a suggestion."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from puzzle_ray.artifacts import Scenario
from puzzle_ray.errors import ConfigError
from puzzle_ray.plugins import did_you_mean
from puzzle_ray.profiling.devices import KNOWN, THIS_CPU, device_of
from puzzle_ray.profiling.scenarios import AUTO, scenario_of
from puzzle_ray.profiling.scenarios import DEFAULT as DEFAULT_SCENARIO
from puzzle_ray.search.limits import BUDGETS, SCENARIO_AXES, Limits

TINY = "tiny"
Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


def _whole_parts(share: float) -> float:
    if share and abs(1 / share - round(1 / share)) > 1e-2 / share:
        raise ValueError("one process takes a whole part of one GPU; write 0, 1, 0.5, 0.333, 0.25 ...")
    return share


GpuShare = Annotated[float, Field(ge=0, le=1), AfterValidator(_whole_parts)]
DType = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Text. A source is a .txt/.jsonl/.parquet file, a folder or glob of them, an fsspec URL, or a datasets hub id."""

    train: str | None = None
    heldout: str | None = None  # without it, a share of the training documents is held out
    heldout_fraction: Fraction = 0.05
    text_column: str = "text"
    split: str = "train"  # of a hub data set
    sequence_length: Annotated[int, Field(ge=8)] = 256
    max_train_tokens: Count = 50_000_000  # what is read of the source at the most
    max_heldout_tokens: Count = 1_000_000


class SpaceConfig(Section):
    """Variants offered to every layer. Percentages are of the parent's own count or width."""

    attention: tuple[str, ...] = ("parent", "gqa:50%", "gqa:25%", "linear", "noop")
    ffn: tuple[str, ...] = ("parent", "ffn:75%", "ffn:50%", "ffn:25%", "ffn:10%", "linear", "noop")
    ffn_multiple_of: Count = 8  # percentages of the FFN width are rounded to a multiple of this


class BlockLoss(Section):
    """Weights of the terms that a block variant minimises; each is 0 for a perfect copy of the parent.

    `block`: normalised MSE of the layer's output (paper, section 3.2). `subblock`: of what each replaced subblock adds to the
    residual. `cosine`: cosine distance of the layer's output, mean over tokens; tokens of small norm, which hardly count in the MSE,
    count as much as others there, as they do behind a norm (0 is the paper's loss; `benchmarks.bld_variants` compares them).
    """

    block: NonNegative = 1.0
    subblock: NonNegative = 0.0
    cosine: NonNegative = 1.0

    @model_validator(mode="after")
    def _some_term(self) -> BlockLoss:
        if self.block + self.subblock + self.cosine == 0:
            raise ValueError("all loss weights are 0; set library.loss.block, library.loss.subblock or library.loss.cosine")
        return self


class EarlyStop(Section):
    """When a variant's training ends before its time: see `puzzle_ray.distill.schedule.is_flat`. Counted from the end of warm-up."""

    min_improvement: Fraction = 0.01  # of the mean loss of a window
    window: Count = 32  # micro-batches
    patience: Count = 2  # windows without improvement


class LibraryConfig(Section):
    """Blockwise local distillation.

    `decoupled` trains every attention and every FFN variant beside the parent's other half; `coupled` every pair of them, both
    halves together, and needs `narrow_from`: an architecture.json, a sweep.json or sweep.parquet, or the folder of such a step
    (path or URL), to whose variants every layer's space is narrowed. `start_from`, the folder of a decoupled library of the same
    parent (path or URL), gives halves that are trained already to start from. With `early_stop` a variant keeps the weights it has
    when its loss is flat, and misses what is left of the learning rate's decay: quality is the price, so it is off unless asked for.
    """

    mode: Literal["decoupled", "coupled"] = "decoupled"
    narrow_from: str | None = None
    start_from: str | None = None
    max_pairs: Count = 24  # of any layer, coupled: each is a block with gradients and two moments in its trainer's memory
    loss: BlockLoss = BlockLoss()
    early_stop: EarlyStop | None = None
    tokens: Count = 1_000_000
    calibration_tokens: Count = 16_384
    validation_tokens: Count = 8_192
    micro_batch_tokens: Count = 2048
    learning_rate: Positive = 1e-3
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weight_decay: NonNegative = 0.0
    gradient_clip: Positive = 1.0
    checkpoint_every: Count = 50  # micro-batches
    window: Count = 3  # micro-batches in flight
    parent_dtype: DType = "float32"  # the parent computes its activations in
    activation_dtype: DType = "float32"  # of what travels
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast; weights, optimizer and loss stay float32

    @model_validator(mode="after")
    def _coupled_is_narrow(self) -> LibraryConfig:
        if self.mode == "coupled" and self.narrow_from is None:
            problem = "mode coupled trains whole pairs, too many of them in a whole search space"
            raise ValueError(f"{problem}; set narrow_from to an architecture.json or a sweep of a decoupled run")
        return self


class ProfileConfig(Section):
    """What is measured, where. `resources` and `label_selector` pin the profilers, e.g. {"accelerator_type:H100": 0.001}.

    `scenario`: see `puzzle_ray.profiling.scenarios`. `batch_sizes: auto` (or `scenario.batch_size: auto`): the powers of two at which
    something fits in `memory_mib` (or `search.limits.memory_mib`); the parent is taken at the largest that it fits.
    Engine `roofline` estimates instead, for a `device` by name, by its figures, or for `cpu` (see `puzzle_ray.profiling.devices`).
    """

    engine: str = "torch"  # or roofline, vllm, tensorrt_llm, or package.module:ATTRIBUTE
    device: str | dict[str, Any] | None = None  # that roofline is for
    scenario: Annotated[Scenario, BeforeValidator(scenario_of)] = DEFAULT_SCENARIO
    batch_sizes: tuple[Count, ...] | Literal["auto"] = ()  # more than the scenario's own
    max_batch_size: Count = 256  # of `auto`
    memory_mib: Positive | None = None  # the device has; where given, no answer needs more. A known device's own with `auto`
    reserved_mib: NonNegative = 0.0  # of it, for what the engine itself needs; activations are counted
    dtype: Literal["float32", "bfloat16", "float16", "fp8"] = "float32"
    repeats: Annotated[int, Field(ge=2)] = 5
    stack: Count = 4  # stacks have twice as many layers; the second no-op stack this many
    num_profilers: Count = 1
    num_gpus: NonNegative = 0
    resources: dict[str, float] = {}
    label_selector: dict[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def _auto_batch_size(cls, values: Any) -> Any:
        """`scenario.batch_size: auto` is `batch_sizes: auto`."""
        if not isinstance(values, dict):
            return values
        scenario, sizes = values.get("scenario"), values.get("batch_sizes")
        if isinstance(sizes, str) and sizes != AUTO:
            raise ValueError(f"batch_sizes = {sizes!r}: write whole numbers, such as [8, 16], or auto")
        if not isinstance(scenario, dict) or scenario.get("batch_size") != AUTO:
            return values
        if sizes not in (None, AUTO, [], ()):
            raise ValueError(f"scenario.batch_size auto beside batch_sizes {sizes}; leave batch_sizes out")
        return values | {"scenario": scenario | {"batch_size": 1}, "batch_sizes": AUTO}

    @model_validator(mode="after")
    def _device_for_an_estimate(self) -> ProfileConfig:
        if self.engine == "roofline":
            if self.device is None:
                raise ValueError(f"engine roofline needs a device; set profile.device to one of {', '.join([*KNOWN, THIS_CPU])}")
            device = device_of(self.device)
            if self.dtype == "fp8" and device is None:
                raise ValueError("device cpu has no fp8; set profile.dtype to float32 or bfloat16")
        elif self.device is not None and ":" not in self.engine:
            problem = f"device is for engine roofline, and engine is {self.engine}, which measures where it runs"
            raise ValueError(f"{problem}; drop profile.device, or set profile.engine=roofline")
        if self.dtype == "fp8" and self.engine == "torch":
            raise ValueError("dtype fp8 is for engines roofline, vllm and tensorrt_llm; torch takes float32, bfloat16 or float16")
        return self


class ScoringConfig(Section):
    """Replace-one damage on held-out text, and what may be spared: see `puzzle_ray.scoring`."""

    metric: Literal[
        "kl",
        "lm_loss",
        "top1_disagreement",
        "top5_disagreement",
        "top10_disagreement",
        "cosine_distance",
        "normalised_mse",
        "downstream",
        "fisher",
    ] = "kl"  # what the search adds up; all that are measured are kept
    granularity: Literal["block", "subblock"] = "subblock"
    tokens: Count = 8_192
    micro_batch_tokens: Count = 2048
    candidate_batch: Count = 1  # candidates of one layer in one pass through the suffix; for tiny micro-batches
    shortlist: Literal["none", "fisher"] = "none"  # estimates every candidate from gradients, to score only some exactly
    shortlist_keep: Annotated[float, Field(ge=0, le=1)] = 0.3  # share of each layer's candidates that are scored exactly at once
    shortlist_settle: bool = True  # then what an answer uses is scored exactly too, and searched again, until nothing is new
    fisher_samples: Count = 1  # labels drawn at every position, a backward pass each
    racing: bool = False  # a candidate is done when its standard error is small enough, before all tokens are read
    racing_stderr: Positive = 0.05  # of the mean
    downstream: str | None = None  # .jsonl of query, choices, gold; half of it scores, the other half is kept to test
    downstream_questions: Count = 200

    @model_validator(mode="after")
    def _metric_is_measured(self) -> ScoringConfig:
        if self.metric == "downstream" and self.downstream is None:
            raise ValueError("metric downstream needs questions; set scoring.downstream to a .jsonl file")
        if self.metric == "fisher" and self.shortlist != "fisher":
            raise ValueError("metric fisher needs its estimates; set scoring.shortlist to fisher")
        return self


class SearchConfig(Section):
    """The budget, how it is searched, and whether whole children are measured before one is picked.

    With `candidates` > 1 or `local_search_steps` > 0 the search's `candidates` best answers, each different from the others in
    `min_different_layers` layers, and one of each of `rivals` are measured on `measure_tokens` held-out tokens; then blocks are
    exchanged while that helps. `sweep`: lists of values by axis, all combinations: limits' names, `batch_size`, `input_tokens`,
    `output_tokens`; `sweep_measure` measures what is on the frontier, `sweep_gkd` distils it as `gkd` says and measures that.
    """

    limits: Limits = Limits(speedup=1.5)
    searcher: str = "mip"
    time_limit_s: Positive = 60.0
    candidates: Count = 1
    min_different_layers: Count = 1
    rivals: tuple[str, ...] = ("greedy", "depth", "uniform", "max_params")
    local_search_steps: Annotated[int, Field(ge=0)] = 0
    interaction_blocks: Annotated[int, Field(ge=0)] = 4  # all pairs of so many much-used blocks are measured
    measure_tokens: Count = 8_192
    sweep: dict[str, tuple[Positive, ...] | None] = {"speedup": (1.1, 1.25, 1.5, 1.75, 2.0)}
    sweep_measure: bool = False
    sweep_gkd: bool = False

    @model_validator(mode="after")
    def _sweep_axes(self) -> SearchConfig:
        known = (*BUDGETS, *SCENARIO_AXES)
        for name, values in self.sweep.items():
            if name not in known:
                raise ValueError(f"sweep.{name} is no axis; {did_you_mean(name, known)}")
            if name in SCENARIO_AXES and any(value != int(value) for value in values or ()):
                raise ValueError(f"sweep.{name} = {list(values or ())}: give whole numbers")
        if not any(self.sweep.get(name) for name in BUDGETS):
            raise ValueError("sweep has no budget; give a limit's values, such as sweep: {speedup: [1.5, 2]}")
        return self

    @property
    def measures(self) -> bool:
        """Whether children are measured before one is picked."""
        return self.candidates > 1 or self.local_search_steps > 0

    @property
    def grid(self) -> dict[str, tuple[float, ...]]:
        """The sweep's axes; those set to null or to nothing are left out."""
        return {name: values for name, values in self.sweep.items() if values}


class GkdConfig(Section):
    """Global knowledge distillation: weights of the loss' terms, and training."""

    tokens: Annotated[int, Field(ge=0)] = 1_000_000
    micro_batch_tokens: Count = 2048  # per worker and step
    num_workers: Count = 1
    learning_rate: Positive = 3e-4
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weight_decay: NonNegative = 0.0
    gradient_clip: Positive = 1.0
    kl_weight: NonNegative = 1.0
    cosine_weight: NonNegative = 1.0
    lm_weight: NonNegative = 0.0
    checkpoint_every: Count = 50  # steps
    max_failures: Annotated[int, Field(ge=-1)] = 3
    use_gpu: bool = False

    @model_validator(mode="after")
    def _some_loss(self) -> GkdConfig:
        if self.kl_weight + self.cosine_weight + self.lm_weight == 0:
            raise ValueError("all loss weights are 0; set gkd.kl_weight, gkd.cosine_weight or gkd.lm_weight")
        return self


class EvaluateConfig(Section):
    tokens: Count = 32_768
    repeats: Annotated[int, Field(ge=1)] = 5
    prompt: str = "Once upon a time"
    sample_tokens: Count = 48


class ClusterConfig(Section):
    """Ray. `address`: `local` starts a cluster on this machine; `auto` or host:port joins one. RAY_ADDRESS wins over `local`."""

    address: str = "local"
    connect_timeout_s: Positive = 30.0
    placement_timeout_s: Positive = 300.0
    num_shards: Count = 2
    blocks_per_trainer: Count | Literal["auto"] = "auto"
    cpus_per_trainer: Count = 1
    gpus_per_trainer: GpuShare = 0
    gpus_per_shard: GpuShare = 0
    step_timeout_s: Positive = 600.0  # one micro-batch of any worker
    max_recoveries: Count = 20
    autoscaling: bool = False  # nodes are added on demand: what none has yet is waited for, up to placement_timeout_s
    transport: str = "object_store"  # of hidden states


class RunConfig(Section):
    """A whole run."""

    parent: str = TINY  # `tiny` (trained on this machine), a folder, or a hub id
    revision: str | None = None
    store: str = "runs"
    seed: Annotated[int, Field(ge=0)] = 0
    tiny_parent_steps: Annotated[int, Field(gt=20)] = 500  # of the training of parent tiny, 20 of them warm-up
    data: DataConfig = DataConfig()
    space: SpaceConfig = SpaceConfig()
    library: LibraryConfig = LibraryConfig()
    profile: ProfileConfig = ProfileConfig()
    scoring: ScoringConfig = ScoringConfig()
    search: SearchConfig = SearchConfig()
    gkd: GkdConfig = GkdConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _whole_sequences(self) -> RunConfig:
        length = self.data.sequence_length
        for section in ("library", "scoring", "gkd"):
            tokens = getattr(self, section).micro_batch_tokens
            if tokens % length:
                raise ValueError(f"{section}.micro_batch_tokens={tokens} is no multiple of data.sequence_length={length}")
        if self.library.mode == "coupled" and self.scoring.granularity == "subblock":
            problem = "scoring.granularity subblock adds up halves, and library.mode coupled has none that stand for themselves"
            raise ValueError(f"{problem}; set scoring.granularity to block")
        if self.library.mode == "coupled" and self.scoring.shortlist == "fisher":
            problem = "scoring.shortlist fisher estimates halves, and library.mode coupled has none that stand for themselves"
            raise ValueError(f"{problem}; set scoring.shortlist to none")
        if self.search.sweep_gkd and self.gkd.tokens == 0:
            raise ValueError(
                "search.sweep_gkd distils the frontier, but gkd.tokens is 0; set gkd.tokens, or search.sweep_gkd=false"
            )
        return self


def recipes() -> dict[str, str]:
    """Name -> YAML text of every recipe that comes with the package."""
    files = resources.files("puzzle_ray.recipes").iterdir()
    return {f.name.removesuffix(".yaml"): f.read_text() for f in files if f.name.endswith(".yaml")}


def load(recipe: str | None = None, file: str | None = None, overrides: tuple[str, ...] = ()) -> RunConfig:
    """A recipe, then a YAML file, then `a.b=c` overrides, each on top of the one before. Raises ConfigError."""
    values: dict[str, Any] = {}
    if recipe is not None:
        known = recipes()
        if recipe not in known:
            raise ConfigError("recipe", f"unknown recipe {recipe!r}", did_you_mean(recipe, known))
        _merge(values, _parse(known[recipe], f"recipe {recipe}"))
    if file is not None:
        path = Path(file).expanduser()
        if not path.is_file():
            raise ConfigError("config", f"there is no file {file!r}", "name a YAML file")
        _merge(values, _parse(path.read_text(), file))
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ConfigError("--set", f"{override!r} is no assignment", "write --set section.key=value")
        try:
            nested: Any = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError("--set", f"{text!r} is not YAML", "quote it as your shell and YAML want it") from None
        for part in reversed(name.split(".")):
            nested = {part: nested}
        _merge(values, nested)
    return validated(values)


def validated(values: dict[str, Any]) -> RunConfig:
    """Raises ConfigError that names the first wrong setting, its value and what to write instead."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "config"
        if first["type"] == "extra_forbidden":
            raise ConfigError(where, "unknown setting", did_you_mean(str(first["loc"][-1]), _known(first["loc"][:-1]))) from None
        message = first["msg"].removeprefix("Value error, ")
        given = f" (given: {first['input']!r})" if not isinstance(first["input"], dict) else ""
        raise ConfigError(where, f"{message}{given}") from None


def _known(path: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in path:
        inner = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        sections = [x for x in (inner, *get_args(inner)) if isinstance(x, type) and issubclass(x, BaseModel)]
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError("config", f"{name} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ConfigError("config", f"{name} holds a {type(values).__name__}", "write section: {key: value}")
    return values


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> None:
    for key, value in extra.items():
        if key == "scenario":  # a name alone is short for {name: ...}
            base[key], value = ({"name": x} if isinstance(x, str) else x for x in (base.get(key), value))
            if isinstance(base[key], dict) and isinstance(value, dict) and {"name", "lengths"} & value.keys():
                base[key] = {"batch_size": base[key].get("batch_size")}  # these take the place of token counts
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
