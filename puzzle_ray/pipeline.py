"""The method in one file: from a trained parent to a distilled child, one plain call below the other, in this process.

    import puzzle_ray
    result = puzzle_ray.compress(parent="org/model", data="text.jsonl", settings={"search.limits.speedup": 1.8})
    print(result.child, result.evaluation["measured_speedup"])

`jobs` does the same stages on Ray and gives the same child, bit for bit. Both keep results in a store under the same keys: what one has
finished the other finds. A run that was interrupted goes on where it was.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch

from puzzle_ray.artifacts import Architecture, Choices, Measure, Profile, Scores
from puzzle_ray.checks import check, check_asked
from puzzle_ray.compression import Round, Setting, assignment, original_source, questions_source, told
from puzzle_ray.config import TINY, load
from puzzle_ray.data.parts import HeldoutParts, heldout_parts
from puzzle_ray.data.sources import source_inputs
from puzzle_ray.data.splits import load_tokens, save_tokens, tokens_summary, train_tokens_source
from puzzle_ray.distill.gkd import GkdJob, distill_child
from puzzle_ray.distill.library import Library, build_serially, carry_over, library_summary, starting_library
from puzzle_ray.distill.race import race_here
from puzzle_ray.distill.realize import realize
from puzzle_ray.distill.rungs import to_json
from puzzle_ray.distill.summary import gkd_summary
from puzzle_ray.distill.text import check_enough
from puzzle_ray.errors import ConfigError
from puzzle_ray.evaluation.child_meter import ChildMeter
from puzzle_ray.evaluation.comparison import Comparison
from puzzle_ray.evaluation.evaluate import evaluate, evaluate_in_shards
from puzzle_ray.evaluation.quality import Quality, quality_facts
from puzzle_ray.evaluation.reader import AskHere
from puzzle_ray.evaluation.requests import ANSWERS
from puzzle_ray.evaluation.task_names import task_sources
from puzzle_ray.models.shards import in_this_process
from puzzle_ray.models.tokenizer import read_tokenizer
from puzzle_ray.planning.settled import for_this_machine
from puzzle_ray.process import compute_with, computing_with, num_cores
from puzzle_ray.profiling.engine import engine_source, profile_summary, target_here
from puzzle_ray.profiling.measure import PROFILE_TABLE, profile_serially
from puzzle_ray.progress import Display, Progress
from puzzle_ray.scoring.downstream import load_questions
from puzzle_ray.scoring.exact import exact_where_used
from puzzle_ray.scoring.replacements import SCORES_TABLE
from puzzle_ray.scoring.serial import SerialScorer, score_serially
from puzzle_ray.search.budget import check_budget
from puzzle_ray.search.choose import ARCHITECTURE, Answers, MakeExact, choose, save_choice
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.rounds import counted_from_original, limits_of_round, unchanged_layers
from puzzle_ray.search.searcher import searcher_sources
from puzzle_ray.search.setup import SearchSetup
from puzzle_ray.store import Artifact, StillToDo, Store, adding_items, do_once, only_looking
from puzzle_ray.variants.space import space_sources
from puzzle_ray.version import torch_series

AFTER_GKD = ("evaluation", "quality")  # stages
EVALUATION, QUALITY = "evaluation.json", "quality.json"
SEQUENCES = 8  # of a batch of held-out text that distillation is watched on


@dataclass(frozen=True)
class Compressed:
    """`child`: a Hugging Face folder, distilled. `architecture`: with `rounds`, that of the last one, where `parent` is what the rounds
    before have made of a layer. `evaluation`: what was kept and gained, see `puzzle_ray.evaluation.evaluate`. `quality`: tasks, retrieval,
    where predictions differ and samples, see `puzzle_ray.evaluation.quality`."""

    child: str
    architecture: Architecture
    evaluation: Mapping[str, Any]
    quality: Mapping[str, Any]


def compress(
    parent: str | PathLike[str] | None = None,
    data: str | PathLike[str] | None = None,
    *,
    recipe: str | None = None,
    file: str | PathLike[str] | None = None,
    store: str | PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """From a parent to a distilled child, without Ray.

    `recipe` comes with the package, `file` is a YAML file, `settings` maps dotted names to values; each goes on top of the one
    before. Raises a PuzzleError that says what is wrong, most of them before any work starts.
    """
    named = {"parent": parent, "data.train": data, "store": store}
    words = {**(settings or {}), **{name: value for name, value in named.items() if value is not None}}
    config = load(recipe, None if file is None else fspath(file), tuple(assignment(*word) for word in words.items()))
    if config.gkd.parallel == "fsdp":
        problem = "fsdp shards a child over several processes, and this is one"
        raise ConfigError("gkd.parallel", problem, "leave it at auto, or use puzzle-ray compress")
    place = Store(config.store)
    if config.hardware is not None:
        config = for_this_machine(config, place)
    no_gpu = ConfigError("gkd.use_gpu", "a GPU is asked for, but PyTorch sees none here", "set gkd.use_gpu: false")
    is_missing = config.gkd.use_gpu and config.gkd.trains and not torch.cuda.is_available()
    if is_missing and place.is_local and not Path(place.root).exists():
        raise no_gpu
    check(config, place)
    s = Setting(config, place, progress or Display())
    if is_missing and still_distils(s):
        raise no_gpu
    return run(s)


def still_distils(s: Setting) -> bool:
    """Whether the store lacks the distilled child of any round, or what comes before it."""
    try:
        with only_looking(), redirect_stderr(io.StringIO()):  # what is finished is told when it is run
            run(s)
    except StillToDo as found:
        return found.artifact.stage not in AFTER_GKD
    return False


def run(s: Setting) -> Compressed:
    """The method. Every line is a stage; a stage that is finished in the store is read from there.

    With `rounds`, all stages up to GKD are done as often. Each time the child of the time before is the parent.
    """
    check_asked(
        s.config, read_tokenizer(s.parent, s.config.trust_remote_code), s.model_config
    )  # can it read prompt and questions?
    tokens = told(tokens_of(s), tokens_summary)  # the text in the parent's tokens
    of_library = s.config.library.for_parent(s.model_config)
    check_enough(load_tokens(tokens)[0], s.config.seed, of_library, s.config.gkd)  # is there enough of it?
    profile = told(profile_of(s), profile_summary)  # what every variant costs on the target
    costs = read_profile(s, profile)
    wanted = s.config.search.limits if s.after is None else limits_of(s, costs)  # of all rounds, before the first one
    check_budget(s.space, costs, s.profile_config.scenario, wanted)  # can it be met at all?
    library = told(library_of(s, tokens), library_summary)  # every variant of every layer, trained to mimic its parent (BLD)
    scores = scores_of(s, tokens, library)  # the damage of every replacement
    architecture = architecture_of(s, tokens, library, profile, scores)  # one variant per layer within the budget (MIP)
    child = child_of(s, library, architecture)  # put together from parent and library
    distilled = told(distilled_of(s, tokens, child), gkd_summary)  # trained as a whole towards the parent (GKD)
    if s.number < s.config.rounds:
        return run(replace(s, after=Round(s, library, read_architecture(architecture).choices, distilled)))
    quality = quality_of(s, tokens, child, distilled)  # what it kept of the parent's answers
    evaluation = evaluation_of(s, tokens, architecture, child, distilled)  # what was lost and gained, measured
    return Compressed(distilled.path("child"), read_architecture(architecture), evaluation, quality)


def once(artifact: Artifact, work: Callable[[Artifact], None]) -> Artifact:
    """Does `work` unless the artifact is finished. Waits for another run that does it; what is damaged is done again."""
    do_once(artifact, work)
    return artifact


def tokens_of(s: Setting) -> Artifact:
    s = s.original  # of which all children have the vocabulary
    text = s.config.data
    if s.config.parent == TINY and text.train is None:
        folder = s.tiny_parent.local_folder("parent")
        text = text.model_copy(update={"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl")})

    def work(artifact: Artifact) -> None:
        tokenizer = read_tokenizer(s.parent, s.config.trust_remote_code)
        save_tokens(text, tokenizer, s.max_positions, artifact, s.model_config.vocab_size, s.progress)

    return once(s.store.artifact("tokens", {"data": text.identity()}, {"parent": s.parent_key} | source_inputs(text)), work)


def parts_of(s: Setting, tokens: Artifact) -> HeldoutParts:
    """Held-out text in three parts that share no sequence: what scores blocks, what picks the child, what is reported."""
    config = s.config
    heldout = load_tokens(tokens, s.separator)[1]
    return heldout_parts(heldout, config.scoring.tokens, config.pick_tokens, config.evaluate.tokens)


def library_of(s: Setting, tokens: Artifact) -> Artifact:
    config, seed = s.config.library.for_parent(s.model_config), s.config.seed
    start = starting_library(config, s.space, s.parent_key)
    inputs = {"parent": s.parent_key} | space_sources(s.space) | train_tokens_source(tokens)
    inputs |= {"start": start.artifact.key} if start else {}
    kept = unchanged_layers(s.after.choices) if s.after else ()
    inputs |= {"carried over": f"{s.after.library.key} {list(kept)}"} if s.after and kept else {}

    def work(artifact: Artifact) -> None:
        train, _ = load_tokens(tokens, s.separator)
        if s.after:
            carry_over(s.after.library, kept, s.space, artifact)
        build_serially(str(s.parent), s.space, config, train, seed, artifact, s.progress, s.cluster.cpus_per_trainer)

    settings = {"library": config.identity(), "seed": seed, "torch": torch_series(), "cluster": s.cluster.library_identity()}
    settings |= s.config.data.mask_identity()
    return once(s.store.artifact("library", settings, inputs), work)


def profile_of(s: Setting) -> Artifact:
    s = s.original  # a name means the same shape in all rounds
    config, target = s.profile_config, target_here(s.config.profile, num_cores())
    inputs = {"parent": s.parent_key} | space_sources(s.whole_space) | target.sources() | engine_source(config.engine)

    def work(artifact: Artifact) -> None:
        compute_with(num_cores())
        profile_serially(s.model_config, s.whole_space, config, artifact, s.progress, target)

    return once(s.store.artifact("profile", {"profile": config.identity()}, inputs), work)


def limits_of(s: Setting, profile: Profile) -> Limits:
    """The limits of a round."""
    return limits_of_round(s.config.search.limits, s.number, s.config.rounds, s.space, profile, s.profile_config.scenario)


def read_profile(s: Setting, profile: Artifact) -> Profile:
    return Profile.from_parquet(profile.read(PROFILE_TABLE)).with_details(s.profile_config.memory())


def scoring_texts(s: Setting, tokens: Artifact) -> list[torch.Tensor]:
    """Held-out token ids that blocks are scored on."""
    config = s.config.scoring
    return parts_of(s, tokens).score.first(config.tokens, config.micro_batch_tokens // s.config.data.sequence_length)


def scores_of(s: Setting, tokens: Artifact, library: Artifact) -> Artifact:
    config = s.config.scoring

    def work(artifact: Artifact) -> None:
        questions = load_questions(str(s.parent), config, s.model_config, trusted=s.config.trust_remote_code)
        data = (scoring_texts(s, tokens), s.space, config, artifact, Library(library).states, s.progress, questions)
        score_serially(s.stack(), *data, s.separator)

    settings = {"scoring": config.identity(), "torch": torch_series(), "cluster": s.cluster.shards_identity()}
    settings |= s.config.data.mask_identity()
    inputs = {"library": library.key} | parts_of(s, tokens).sources(score=config.tokens) | questions_source(s)
    return once(s.store.artifact("scores", settings, inputs), work)


def architecture_of(s: Setting, tokens: Artifact, library: Artifact, profile: Artifact, scores: Artifact) -> Artifact:
    config, search, scoring = s.config, s.config.search, s.config.scoring
    settings: dict[str, Any] = {"search": search.identity(), "metric": scoring.metric, "exact": scoring.makes_exact}
    settings |= {"seed": config.seed, "memory": s.profile_config.memory()}
    settings |= {"round": [s.number, config.rounds]} if config.rounds > 1 else {}
    settings |= {"gkd": config.gkd_before_pick.identity(), "torch": torch_series()} if search.distils else {}
    settings |= config.data.mask_identity() if search.measures else {}

    def work(artifact: Artifact) -> None:
        costs = read_profile(s, profile)
        asked = search.model_copy(update={"limits": limits_of(s, costs)})
        damage = Scores.from_parquet(scores.read(SCORES_TABLE))
        numbers = (s.space, damage, costs, s.profile_config.scenario, scoring.metric)
        setup = SearchSetup(*numbers, search.searcher, search.time_limit_s, asked.limits, config.seed)
        make_exact = exact(s, tokens, library, scores) if scoring.makes_exact else None
        distilled = lambda children: [distilled_kl(s, tokens, library, choices) for choices in children]  # noqa: E731
        race = lambda children: raced(s, tokens, library, children, artifact)  # noqa: E731
        chosen = choose(setup, asked, make_exact, lambda: measuring(s, tokens, library), distilled, race)
        counted = counted_from_original(chosen.architecture, setup) if s.after else chosen.architecture
        save_choice(replace(chosen, architecture=counted), artifact)

    inputs = {"profile": profile.key, "scores": scores.key} | searcher_sources(search.searcher)
    if search.measures:
        read = max(search.measure_tokens, config.gkd.heldout_tokens if search.distils else 0)
        inputs |= searcher_sources(search.searcher, search.rivals) | parts_of(s, tokens).sources(pick=read)
    inputs |= train_tokens_source(tokens) | original_source(s) if search.distils else {}
    return once(s.store.artifact("architecture", settings, inputs), work)


def distilled_kl(s: Setting, tokens: Artifact, library: Artifact, choices: Choices) -> float:
    """A candidate's held-out KL after a short distillation."""
    config = s.config.model_copy(update={"gkd": s.config.gkd_before_pick})
    with computing_with(threads_of_gkd(s)):
        short = distilled_of(replace(s, config=config), tokens, child_with(s, library, choices))
    return float(short.facts()["heldout_kl"])


def raced(
    s: Setting, tokens: Artifact, library: Artifact, children: Sequence[Choices], artifact: Artifact
) -> list[list[dict[str, Any]]]:  # fmt: skip
    """What candidates were at every rung of a race. Each begins the distillation that it would have if it were picked."""
    with computing_with(threads_of_gkd(s)):
        jobs = [distillation_of(s, tokens, child_with(s, library, choices)) for choices in children]
        rows = race_here(jobs, s.config.gkd.race_steps(s.config.search.race_rungs), artifact, s.progress)
    return [[to_json(row) for row in rows[job.artifact.key]] for job in jobs]


def exact(s: Setting, tokens: Artifact, library: Artifact, scores: Artifact) -> MakeExact:
    """What makes scores exact where answers rest on estimates."""
    config = s.config.scoring
    artifact = s.store.artifact("exact_scores", {}, {"scores": scores.key})
    questions = load_questions(str(s.parent), config, s.model_config, trusted=s.config.trust_remote_code)
    data = (scoring_texts(s, tokens), config, artifact, Library(library).states, s.progress, questions)
    scorer = SerialScorer(s.stack(), *data, s.separator)

    def make(found: Scores, answers: Answers) -> Scores:
        with adding_items(artifact):
            return exact_where_used(found, config.metric, answers, scorer.score_alone)

    return make


@contextmanager
def measuring(s: Setting, tokens: Artifact, library: Artifact) -> Iterator[Measure]:
    """A function that measures whole children on held-out text."""
    count, sequences = s.config.search.measure_tokens, s.config.scoring.micro_batch_tokens // s.config.data.sequence_length
    batches = parts_of(s, tokens).pick.first(count, max(1, sequences))
    meter = ChildMeter(s.stack(), Library(library), batches, separator=s.separator)
    yield lambda children: [meter.measure(choices) for choices in children]


def read_architecture(artifact: Artifact) -> Architecture:
    return Architecture.from_json(artifact.read(ARCHITECTURE))


def child_of(s: Setting, library: Artifact, architecture: Artifact) -> Artifact:
    return child_with(s, library, read_architecture(architecture).choices)


def child_with(s: Setting, library: Artifact, choices: Choices) -> Artifact:
    inputs = {"library": library.key, "parent": s.parent_key, "choices": ", ".join(choice.label for choice in choices)}
    return once(s.store.artifact("child", {}, inputs), lambda artifact: realize(str(s.parent), choices, library, artifact))


def threads_of_gkd(s: Setting) -> int:
    """As each worker on a machine like this one."""
    return max(1, num_cores() // s.config.gkd.num_workers)


def distillation_of(s: Setting, tokens: Artifact, child: Artifact) -> GkdJob:
    """What the distillation of a child reads, and where its result is kept."""
    config, seed, parts = s.config.gkd, s.config.seed, parts_of(s, tokens)
    settings = {"gkd": config.identity(), "seed": seed, "torch": torch_series()} | s.config.data.mask_identity()
    inputs = {"child": child.key} | train_tokens_source(tokens) | original_source(s)
    inputs |= parts.sources(pick=config.heldout_tokens) if config.heldout_tokens else {}
    artifact = s.store.artifact("gkd", settings, inputs)
    heldout = parts.pick.first(config.heldout_tokens, SEQUENCES) if config.heldout_tokens else []
    how = (config, seed, None, tuple(ids.numpy() for ids in heldout), s.separator, s.config.trust_remote_code)
    return GkdJob(str(s.original.parent), child, tokens, artifact, *how)


def distilled_of(s: Setting, tokens: Artifact, child: Artifact) -> Artifact:
    job = distillation_of(s, tokens, child)

    def work(artifact: Artifact) -> None:
        compute_with(threads_of_gkd(s))
        distill_child(job, s.progress)

    return once(job.artifact, work)


def evaluation_of(
    s: Setting, tokens: Artifact, architecture: Artifact, child: Artifact, distilled: Artifact
) -> Mapping[str, Any]:
    config, profile, scoring, parts = s.config.evaluate, s.profile_config, s.config.scoring, parts_of(s, tokens)
    folders = {"parent": str(s.original.parent), "child_before_gkd": child.path("child"), "child": distilled.path("child")}

    def work(artifact: Artifact) -> None:
        compute_with(1 if config.num_shards else num_cores())  # as every shard computes
        batches = parts.test.first(config.tokens, config.sequences(s.config.data.sequence_length))
        questions = load_questions(str(s.parent), scoring, s.model_config, "test", s.config.trust_remote_code)
        timed = (config, profile.scenario, profile.dtype)
        trusted = s.config.trust_remote_code
        how = Comparison(*timed, read_architecture(architecture), questions, s.separator, trusted, profile.engine)
        if config.num_shards:
            shards = min(config.num_shards, s.model_config.num_hidden_layers)
            found = evaluate_in_shards(folders, batches, how, s.progress, in_this_process(shards), shards)
        else:
            found = evaluate(folders, batches, how, s.progress, profile.num_gpus)
        artifact.write_json(EVALUATION, found | {"heldout": parts.ranges})
        artifact.finish({name: found[name] for name in ("measured_speedup", "predicted_speedup")})

    settings: dict[str, Any] = {"evaluate": config.identity(), "profile": profile.identity()} | s.config.data.mask_identity()
    settings |= {} if scoring.downstream is None else {"downstream_questions": scoring.downstream_questions}
    settings |= {"cluster": s.cluster.shards_identity()} if config.num_shards else {}
    inputs = {"gkd": distilled.key, "child": child.key, "architecture": architecture.key} | parts.sources(test=config.tokens)
    artifact = once(s.store.artifact("evaluation", settings, inputs | questions_source(s) | original_source(s)), work)
    return dict(artifact.read_json(EVALUATION))


def quality_of(s: Setting, tokens: Artifact, child: Artifact, distilled: Artifact) -> Mapping[str, Any]:
    config, parts = s.config.evaluate, parts_of(s, tokens)
    folders = {"parent": str(s.original.parent), "child_before_gkd": child.path("child"), "child": distilled.path("child")}

    def work(artifact: Artifact) -> None:
        compute_with(1)  # as every reader computes
        counts = load_tokens(tokens)[0].counts(s.model_config.vocab_size)
        quality = Quality(folders, parts.test, counts, config, s.config.asked_half, s.config.seed, s.config.trust_remote_code)
        layers_of = in_this_process(config.num_shards) if config.num_shards else None
        found = quality.run(AskHere(folders, config.batch_tokens, artifact, s.progress, s.config.trust_remote_code, layers_of))
        artifact.write_json(QUALITY, found)
        artifact.finish(quality_facts(found), drop=[f"{ANSWERS}/{name}" for name in artifact.names(ANSWERS)])

    inputs = {"gkd": distilled.key, "child": child.key} | parts.sources(test=config.tokens) | train_tokens_source(tokens)
    inputs |= original_source(s)
    settings = {"quality": s.config.quality_identity(), "cluster": s.cluster.shards_identity()} | s.config.data.mask_identity()
    artifact = once(s.store.artifact("quality", settings, inputs | task_sources(config.tasks)), work)
    return dict(artifact.read_json(QUALITY))
