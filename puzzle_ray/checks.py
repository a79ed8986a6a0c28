"""Everything that can be known to be wrong before work starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from puzzle_ray.artifacts import PARENT
from puzzle_ray.config import TINY, RunConfig
from puzzle_ray.data.sources import check_apart, check_source, named_sources
from puzzle_ray.errors import ConfigError, ParentError
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.store import Store
from puzzle_ray.store.root import is_hidden


def check(config: RunConfig, store: Store) -> None:
    """Looks at settings, store, text, parent and search space. Raises a PuzzleError with one clear line."""
    from puzzle_ray.distill.layer_weights import layer_weights
    from puzzle_ray.profiling.engine import engine_of
    from puzzle_ray.search.searcher import RIVALS, find_searcher

    store.check()
    find_searcher(config.search.searcher)
    for name in config.search.rivals:
        find_searcher(name, RIVALS)
    engine_of(config.profile)
    data = config.data
    for where, source in named_sources(data):
        check_source(source.source, where)
        _check_store_apart(store, source.source, where)
    check_apart(data)
    if config.scoring.downstream is not None:
        check_source(config.scoring.downstream, "scoring.downstream")
    _check_questions(config.scoring)
    if data.train is None and (config.parent != TINY or data.heldout is not None):
        raise ConfigError("data.train", "no training text is named", "give --data, or use parent: tiny without data.heldout")
    model_config = _tiny_config() if config.parent == TINY else _checked_parent(config)
    _check_space(config, model_config)
    _check_document_mask(config, model_config)
    layer_weights(config.gkd, model_config)
    _check_evaluation(config, model_config)


def _check_store_apart(store: Store, source: str, where: str) -> None:
    """What a run writes must be no text of the next one."""
    places = [place.removeprefix("file://") for place in (store.root, source)]
    if any("://" in place for place in places):
        return
    root, folder = (Path(place).expanduser().resolve() for place in places)
    inside = root.is_relative_to(folder) and not is_hidden(root.relative_to(folder).as_posix())
    if folder.is_dir() and (root == folder or inside):
        problem = f"{store.root!r} lies in {source!r}, all of which is read as {where}"
        raise ConfigError("store", problem, "name a store elsewhere, or the files of text by a glob")


def _check_evaluation(config: RunConfig, model_config: Any) -> None:
    """Tasks that are there, and texts that the parent has positions for."""
    evaluate, positions = config.evaluate, getattr(model_config, "max_position_embeddings", None)
    asked = {
        "evaluate.window_tokens": evaluate.window_tokens,
        "evaluate.retrieval_tokens": max(evaluate.retrieval_tokens, default=0),
    }
    for where, tokens in asked.items():
        if tokens and positions is not None and tokens > positions:
            raise ConfigError(where, f"{tokens} tokens do not fit the parent's {positions} positions", "ask for fewer")
    if evaluate.tasks:
        from puzzle_ray.evaluation.task_names import harness_version

        harness_version()
        from puzzle_ray.evaluation.harness import check_tasks

        check_tasks(evaluate.tasks)


def _check_document_mask(config: RunConfig, model_config: Any) -> None:
    """Whether the parent, and so all of its children, read every document of a packed sequence as if it stood alone."""
    from puzzle_ray.models.packed import check_packed

    if config.data.document_mask:
        rows = (config.data.sequence_length, config.evaluate.window_tokens or 0)
        check_packed(model_config, max(*rows, *(stage.sequence_length for stage in config.gkd.stages)))


def _check_questions(scoring: ScoringConfig) -> None:
    """Both halves have some: one scores blocks, the other is not read before the child is there."""
    from puzzle_ray.scoring.downstream import HALVES, read_questions

    if scoring.downstream is not None:
        for half in HALVES:
            read_questions(scoring.downstream, half, scoring.downstream_questions)


def _parent_key(config: RunConfig) -> str | None:
    """What identifies the parent, where a library is to be of it; None also for the tiny parent, which is there only when it is trained."""
    from puzzle_ray.models.checkpoint import fingerprint, locate

    if config.library.start_from is None or config.parent == TINY:
        return None
    return fingerprint(locate(config.parent, config.revision, config.trust_remote_code))


def _check_space(config: RunConfig, model_config: Any) -> None:
    from puzzle_ray.distill.library import starting_library
    from puzzle_ray.export.target import configured_space
    from puzzle_ray.models.describe import check_resizing
    from puzzle_ray.profiling.batch_sizes import with_batch_sizes
    from puzzle_ray.profiling.measure import check_shapes
    from puzzle_ray.search.budget import check_sizes
    from puzzle_ray.search.narrow import library_space
    from puzzle_ray.search.sweep import longest_context
    from puzzle_ray.search.tables import check_limits

    space = configured_space(model_config, config.space, config.search.target_format)
    narrowed = library_space(space, config.library)
    check_resizing(model_config, narrowed)
    if all(layer.attention == layer.ffn == (PARENT,) for layer in narrowed.layers):
        problem = (
            f"nothing in attention {list(config.space.attention)} and ffn {list(config.space.ffn)} differs from the parent's own"
        )
        raise ConfigError("space", problem, "name variants that are smaller than the parent's, such as gqa:50%, ffn:50% or noop")
    check_limits(narrowed, config.search.limits)
    starting_library(config.library, narrowed, _parent_key(config))
    profile = with_batch_sizes(config.profile, model_config, space, config.search.limits.memory_mib)
    check_shapes(space, model_config, profile)
    check_sizes(narrowed, model_config, profile, config.search.limits)
    longest = max([config.data.sequence_length, *(stage.sequence_length for stage in config.gkd.stages)])
    needed = max(longest, longest_context(config.search.grid, profile))
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None and needed > positions:
        problem = f"sequences of {needed} tokens do not fit its {positions} positions"
        raise ConfigError("parent", problem, "shorten data.sequence_length, gkd.stages or profile.scenario")


def _tiny_config() -> Any:
    from puzzle_ray.recipes.tiny_parent import TinyParentSpec, model_config

    return model_config(TinyParentSpec())


def _checked_parent(config: RunConfig) -> Any:
    """The parent's config, after a look at its family, weights, tokenizer and the text that it is to read."""
    from puzzle_ray.data.documents import check_text
    from puzzle_ray.distill.chosen_tokens import answer_markers
    from puzzle_ray.models.checkpoint import locate
    from puzzle_ray.models.child import read_config
    from puzzle_ray.models.describe import describe
    from puzzle_ray.models.manifest import check_weights
    from puzzle_ray.models.tokenizer import check_tokenizer, read_tokenizer

    no_hub_id = ConfigError("revision", f"{config.revision!r} is of a hub id, and {config.parent!r} is none", "leave it out")
    if config.revision and "://" in config.parent:  # before it is fetched
        raise no_hub_id
    folder = locate(config.parent, config.revision, config.trust_remote_code)
    if config.revision and folder == Path(config.parent).expanduser():
        raise no_hub_id
    model_config = read_config(folder)
    describe(model_config)
    if getattr(model_config, "quantization_config", None):
        raise ParentError("parent", f"the weights of {config.parent!r} are quantized", "give the checkpoint they were made from")
    for remark in check_weights(folder, model_config):
        print(f"  parent: {remark}", file=sys.stderr, flush=True)
    tokenizer = read_tokenizer(folder, config.trust_remote_code)
    check_tokenizer(tokenizer, model_config)
    check_text(config.data, tokenizer)
    answer_markers(config.gkd.lm_tokens, tokenizer)
    check_asked(config, tokenizer, model_config)
    if config.rounds > 1 and getattr(model_config, "puzzle_layers", None):
        problem = f"{config.rounds} rounds count costs from their first parent, and {config.parent!r} is a child itself"
        raise ConfigError("rounds", problem, "set rounds to 1, or name the model that it was made from")
    return model_config


def check_asked(config: RunConfig, tokenizer: Any, model_config: Any) -> None:
    """Raises ConfigError or DataError for a prompt or questions that the parent's vocabulary or positions are too small for, and for
    numbers that do not fit a text in which they are to be found again.

    Also for text that `data.document_mask` cannot be used with. The tiny parent's tokenizer is there only when it is trained; its runs
    look then.
    """
    from puzzle_ray.data.documents import check_separators
    from puzzle_ray.evaluation.evaluate import check_prompt
    from puzzle_ray.scoring.downstream import HALVES, batches_for

    if config.data.document_mask:
        check_separators(config.data, tokenizer)
    positions = getattr(model_config, "max_position_embeddings", None)
    check_prompt(config.evaluate, tokenizer, positions, model_config.vocab_size)
    evaluate = config.evaluate
    if lengths := evaluate.retrieval_tokens:
        from puzzle_ray.evaluation.retrieval import check_lengths

        check_lengths(tokenizer, lengths, evaluate.retrieval_depths, evaluate.retrieval_questions, config.seed, positions)
    if config.evaluate.tasks and tokenizer.eos_token_id is None:
        problem = "the parent's tokenizer has no token that ends a text, which the harness asks for"
        raise ConfigError("evaluate.tasks", problem, "leave them out, or save the tokenizer with its eos_token")
    if config.evaluate.tasks:
        from puzzle_ray.evaluation.question_files import check_texts

        limit = None if config.asked_half else evaluate.limit  # of a half they are not the first lines
        check_texts(evaluate.tasks, tokenizer, model_config, limit)
    for half in HALVES if config.scoring.downstream is not None else ():
        batches_for(tokenizer, config.scoring, model_config, half)
