"""All settings of a run, one model per stage. YAML + `--set a.b=c` on top; unknown keys are refused with a suggestion."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from puzzle_ray.artifacts import PARENT
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.distill.settings import AUTO, GkdConfig, LibraryConfig
from puzzle_ray.errors import ConfigError
from puzzle_ray.evaluation.settings import EvaluateConfig
from puzzle_ray.plugins import did_you_mean
from puzzle_ray.profiling.nodes import REMEDY, described
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.scoring.halves import Half
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.search.settings import SearchConfig
from puzzle_ray.settings import Name, Section, types_in
from puzzle_ray.variants.space import SpaceConfig

TINY = "tiny"
HARDWARE = "auto"  # the cluster that is there decides
_OCTAL = re.compile("0[0-7]+")
_LONGEST = 200  # characters of what a user wrote, in an error
_KIND_OF_VALUE = re.compile(r"(constrained-)?(int|str|float|bool)|(literal|tuple|list|dict|function-\w+)\[.*\]|\[key\]", re.S)


class RunConfig(Section):
    """A whole run.

    With `hardware: auto` the cluster decides what the config leaves open: dtypes, micro-batches, shards, shares of GPUs, GKD's workers and
    steps; a cluster in words, such as `8x8 H100-80GB`, is taken in place of a look at the one that is there. What was decided is said at
    the start, and `puzzle-ray config --resolved` shows it. What a result depends on is kept in the store, and holds for later runs there.
    """

    parent: Name = TINY  # `tiny` (trained on this machine), a folder, or a hub id
    revision: str | None = None
    trust_remote_code: bool = False  # code that comes with the parent's tokenizer may run; a model's own never does
    store: Name = "runs"
    hardware: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    rounds: Annotated[int, Field(ge=1, le=32)] = 1  # to the budget; every round's child, distilled, is the next one's parent
    tiny_parent_steps: Annotated[int, Field(gt=20)] = 400  # of the training of parent tiny, 20 of them warm-up
    data: DataConfig = DataConfig()
    space: SpaceConfig = SpaceConfig()
    library: LibraryConfig = LibraryConfig()
    profile: ProfileConfig = ProfileConfig()
    scoring: ScoringConfig = ScoringConfig()
    search: SearchConfig = SearchConfig()
    gkd: GkdConfig = GkdConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def asked_half(self) -> Half | None:
        """The half of the questions of `evaluate.tasks` that is asked; None is all of them."""
        apart = self.evaluate.half == "test" or (self.evaluate.half == "auto" and self.scoring.downstream is not None)
        return "test" if apart else None

    @property
    def pick_tokens(self) -> int:
        """Held-out tokens that the part of the pick is asked for: what children are measured on, and what GKD is watched on.

        GKD asks for no more than the test does: where text is scarce, that would be taken from the reported figures.
        """
        watched = min(self.gkd.heldout_tokens, self.evaluate.tokens) if self.gkd.trains else 0
        return max(self.search.picked_by_tokens, watched)

    @property
    def gkd_before_pick(self) -> GkdConfig:
        """How candidates are distilled before one is picked: for a short while, or, in a race, as the one that is picked."""
        tokens = self.search.distil_tokens
        return self.gkd.shortened(tokens) if tokens else self.gkd

    def quality_identity(self) -> dict[str, Any]:
        """The settings that the stage `quality` depends on."""
        half = {"half": self.asked_half} if self.evaluate.tasks else {}
        drawn = {"seed": self.seed} if self.evaluate.tasks or self.evaluate.retrieval_tokens else {}
        return self.evaluate.quality_identity() | half | drawn

    @field_validator("hardware")
    @classmethod
    def _a_cluster(cls, given: str | None) -> str | None:
        if given not in (None, HARDWARE):
            try:
                described(str(given))
            except ValueError as error:
                raise ValueError(f"{error}; write auto, or {REMEDY.removeprefix('write ')}") from None
        return given

    @model_validator(mode="after")
    def _a_whole_step(self) -> RunConfig:
        gkd = self.gkd
        together = gkd.num_workers * gkd.micro_batch_tokens * gkd.gradient_accumulation
        counts = gkd.step_tokens is not None and gkd.trains and not gkd.stages and self.hardware is None
        if counts and together != gkd.step_tokens:
            problem = (
                f"gkd.step_tokens={gkd.step_tokens}, and num_workers x micro_batch_tokens x gradient_accumulation is {together}"
            )
            raise ValueError(f"{problem}; make them equal, leave gkd.step_tokens out, or set hardware to auto")
        return self

    @model_validator(mode="after")
    def _whole_sequences(self) -> RunConfig:
        length = self.data.sequence_length
        unread = self.gkd.stages and not self.search.distil_tokens  # stages have micro-batches of their own
        for section in ("library", "scoring") if unread else ("library", "scoring", "gkd"):
            tokens = getattr(self, section).micro_batch_tokens
            decided = self.hardware is not None and "micro_batch_tokens" not in getattr(self, section).model_fields_set
            if tokens % length and not decided:
                raise ValueError(f"{section}.micro_batch_tokens={tokens} is no multiple of data.sequence_length={length}")
        for number, stage in enumerate(self.gkd.stages):
            if stage.sequence_length % length and length % stage.sequence_length:
                problem = f"gkd.stages[{number}].sequence_length={stage.sequence_length} is neither a multiple nor a part of"
                raise ValueError(f"{problem} data.sequence_length={length}")
        if self.gkd.parallel == "fsdp" and (self.search.sweep_rungs > 1 or self.search.distils):
            name, off = ("race_rungs" if self.search.race_rungs else "distil_tokens", 0)
            name, off = (name, off) if self.search.distils else ("sweep_rungs", 1)
            problem = f"search.{name} distils every child in one process, and gkd.parallel fsdp shards it over several"
            raise ValueError(f"{problem}; set search.{name} to {off}, or gkd.parallel to ddp")
        if self.library.mode == "coupled" and self.scoring.granularity == "subblock":
            problem = "scoring.granularity subblock adds up halves, and library.mode coupled has none that stand for themselves"
            raise ValueError(f"{problem}; set scoring.granularity to block")
        if self.library.mode == "coupled" and self.scoring.shortlist == "fisher":
            problem = "scoring.shortlist fisher estimates halves, and library.mode coupled has none that stand for themselves"
            raise ValueError(f"{problem}; set scoring.shortlist to none")
        if self.rounds > 1 and (self.library.narrow_from or self.library.start_from):
            named = "narrow_from" if self.library.narrow_from else "start_from"
            problem = f"library.{named} is about one parent, and every one of rounds={self.rounds} has another"
            raise ValueError(f"{problem}; leave it out, or set rounds: 1")
        if self.search.sweep_gkd and not self.gkd.trains:
            nothing, remedy = self.gkd.why_none
            raise ValueError(f"search.sweep_gkd distils the frontier, but {nothing}; {remedy}, or set search.sweep_gkd=false")
        families = {name.partition(":")[0] for name in (*self.space.attention, *self.space.ffn)} - {PARENT}
        for family in self.search.without:
            if family not in families:
                raise ValueError(
                    f"search.without names {family!r}, which space does not have; {did_you_mean(family, sorted(families))}"
                )
        if self.search.distils and not (self.gkd.trains and self.gkd.heldout_tokens):
            nothing, remedy = ("gkd.heldout_tokens is 0", "set gkd.heldout_tokens") if self.gkd.trains else self.gkd.why_none
            name = "race_rungs" if self.search.race_rungs else "distil_tokens"
            given = getattr(self.search, name)
            problem = f"search.{name}={given} compares distilled children by held-out KL, but {nothing}"
            raise ValueError(f"{problem}; {remedy}, or leave out search.{name}")
        if self.search.sweep_rungs > 1 and not self.gkd.heldout_tokens:
            raise ValueError(
                f"search.sweep_rungs={self.search.sweep_rungs} compares children by held-out KL, but gkd.heldout_tokens is 0; "
                "set gkd.heldout_tokens, or search.sweep_rungs=1"
            )
        return self

    @model_validator(mode="after")
    def _a_race(self) -> RunConfig:
        """Rungs before the end; and checkpoints that stage `gkd` goes on from, which are others where it shards a child."""
        gkd, rungs = self.gkd, self.search.race_rungs
        if not rungs or self.hardware is not None:  # what the hardware decides of GKD is looked at when it is known
            return self
        if not gkd.race_steps(rungs):
            problem = (
                f"search.race_rungs={rungs} finds no look at held-out text before the last of {gkd.total_steps} steps of GKD"
            )
            raise ValueError(f"{problem}, with gkd.heldout_looks={gkd.heldout_looks}; raise gkd.heldout_looks or gkd.tokens")
        if gkd.parallel == AUTO and gkd.use_gpu and gkd.num_workers > 1:
            problem = f"search.race_rungs={rungs} begins distillations that go on from checkpoints of whole children, and gkd.parallel auto"
            raise ValueError(
                f"{problem} may shard them over {gkd.num_workers} GPUs; set gkd.parallel to ddp, or search.race_rungs to 0"
            )
        return self


def recipes() -> dict[str, str]:
    """Name -> YAML text of every recipe that comes with the package."""
    files = resources.files("puzzle_ray.recipes").iterdir()
    return {f.name.removesuffix(".yaml"): f.read_text() for f in files if f.name.endswith(".yaml")}


def load(recipe: str | None = None, file: str | Sequence[str] | None = None, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Recipes (`name` or `name,name`), then YAML files, then `a.b=c` overrides, each on top of the one before. Raises ConfigError."""
    values: dict[str, Any] = {}
    for name in [] if recipe is None else map(str.strip, recipe.split(",")):
        known = recipes()
        if name not in known:
            raise ConfigError("recipe", f"unknown recipe {name!r}", did_you_mean(name, known))
        _merge(values, _parse(known[name], f"recipe {name}"))
    for path in [file] if isinstance(file, str) else file or ():
        _merge(values, _parse(_text_of(path), repr(path)))
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ConfigError("--set", f"{override!r} is no assignment", "write --set section.key=value")
        nested = _yaml(text, "--set", f"{_shortened(text)!r} is not YAML", "quote it as your shell and YAML want it")
        for part in reversed(name.split(".")):
            nested = {part: nested}
        _merge(values, nested)
    return validated(values)


def validated(values: dict[str, Any]) -> RunConfig:
    """Raises ConfigError that names the first wrong setting, its value and what to write instead."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        first, *others = error.errors()
        where = _place(first["loc"]) or "config"
        if first["type"] == "extra_forbidden":
            raise ConfigError(where, "unknown setting", did_you_mean(str(first["loc"][-1]), _known(first["loc"][:-1]))) from None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "tuple_type":
            message = f"Input should be a list: write {_as_list(first['input'])}"
        if first["type"] == "string_type":
            message += _quoted(first["input"])
        words = [e["ctx"]["expected"] for e in others if e["type"] == "literal_error" and (_place(e["loc"]) or "config") == where]
        message = " or ".join([message, *words])
        given = f" (given: {_shortened(' '.join(repr(first['input']).split()))})" if not isinstance(first["input"], dict) else ""
        raise ConfigError(where, f"{message}{given}") from None


def _place(location: Sequence[int | str]) -> str:
    """The dotted name of a setting. Pydantic adds the kinds of value that a setting may have, where there are several."""
    parts = [part for part in location if isinstance(part, int) or not _KIND_OF_VALUE.fullmatch(part)]
    return ".".join(_shortened(" ".join(str(part).split())) for part in parts)


def _quoted(given: object) -> str:
    """What to write for a word that YAML takes for something else, such as a commit's name of digits alone, `1.10` or `no`."""
    if isinstance(given, int) and not isinstance(given, bool):
        return f": write '{given}' in quotes"
    return ": write it in quotes" if isinstance(given, bool | float | date) else ""


def _as_list(given: object) -> str:
    if isinstance(given, str) and given.startswith("["):
        return _shortened(given)  # a list within quotes
    return f"[{_shortened(str(given))}]" if isinstance(given, str | int | float) and not isinstance(given, bool) else "[...]"


def _known(path: tuple[int | str, ...]) -> list[str]:
    """The names of the settings at a place. Entries of lists and mappings, and kinds of value, have no names in it."""
    model: type[BaseModel] = RunConfig
    for part in path:
        field = model.model_fields.get(str(part))
        types = () if field is None else types_in(field.annotation)
        model = next((x for x in types if isinstance(x, type) and issubclass(x, BaseModel)), model)
    return list(model.model_fields)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML's own would forget the first, and numbers that it reads otherwise
    than they look: 010 as 8, and 1:30 as 90."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_looked_at(self, node: yaml.ScalarNode) -> Any:
        value = self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)
        digits = node.value.lstrip("+-").replace("_", "")
        remedy = f"write {value}, or quote it" if ":" in digits else ""
        if _OCTAL.fullmatch(digits):
            remedy = f"write {value} or {int(node.value.replace('_', ''))}, or quote it"
        if remedy:
            raise yaml.constructor.ConstructorError(None, None, f"{node.value} is {value} to YAML; {remedy}", node.start_mark)
        return value


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_looked_at)


def _text_of(file: str) -> str:
    path = Path(file).expanduser()
    try:
        if path.is_dir():
            raise ConfigError("config", f"{file!r} is a folder", "name a YAML file")
        if not path.exists():
            raise ConfigError("config", f"there is no file {file!r}", "name a YAML file")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError("config", f"{file!r} is not UTF-8", "save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError("config", f"{file!r} cannot be read ({reason})", "name a YAML file that can be read") from None


def _yaml(text: str, where: str, problem: str, remedy: str) -> Any:
    """The value of a text. What YAML's parser and its numbers and dates raise is told in one line."""
    try:
        value = yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
        json.dumps(value, default=str)  # an alias that holds itself
        return value
    except Exception as error:
        reason = "too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(where, f"{problem} ({_shortened(reason)})", remedy) from None


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _parse(text: str, name: str) -> dict[str, Any]:
    values = _yaml(text, "config", f"{name} is not YAML", "write section: {key: value}")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError("config", f"{name} holds a {type(values).__name__}", "write section: {key: value}")
    return {key: value for key, value in values.items() if value is not None or not _is_section(key)}


def _is_section(key: object) -> bool:
    """Of a section whose lines are all comments nothing is left but its name."""
    field = RunConfig.model_fields.get(str(key))
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


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
