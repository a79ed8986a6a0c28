"""The scoring stage in one process, without Ray."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from puzzle_ray.artifacts import Scores, SearchSpace
from puzzle_ray.models.blocks import LayerStack
from puzzle_ray.progress import Progress
from puzzle_ray.scoring import fisher
from puzzle_ray.scoring.downstream import QuestionBatch
from puzzle_ray.scoring.items import groups, merge, replacements, saved_rows, unfinished
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.scoring.shard import ShardScorer, StatesOf
from puzzle_ray.scoring.shortlist import Shortlist, footprints
from puzzle_ray.store import Artifact


def score_serially(
    stack: LayerStack,
    texts: Sequence[Tensor],
    space: SearchSpace,
    config: ScoringConfig,
    artifact: Artifact,
    states_of: StatesOf,
    progress: Progress,
    questions: Sequence[QuestionBatch] = (),
) -> Scores:
    """The scoring stage in this process, without Ray. `stack` holds the whole parent."""
    items = replacements(space, config.granularity)
    scorer = ShardScorer(stack, texts, questions)
    started: list[bool] = []

    def ready() -> ShardScorer:
        if not started:
            scorer.run_parent(scorer.input_ids)
            started.append(True)
        return scorer

    shortlist = None
    if config.shortlist == "fisher":
        for name, batches in fisher.unfinished(len(texts), artifact):
            found, _ = fisher.shard_estimates(ready(), batches, None, space, config, states_of)
            fisher.save(artifact, name, [found])
        found = fisher.load(len(texts), artifact)
        tokens = sum(ids.numel() for ids in texts)
        shortlist = Shortlist.of(items, found, tokens, footprints(space, stack.descriptor, stack.config), space, config)
    wanted = shortlist.exact if shortlist else items
    all_groups = groups(wanted, config, len(texts), len(questions))
    todo = unfinished(all_groups, artifact)
    with progress.stage("score", len(wanted), "block") as bar:
        bar.advance(len(wanted) - sum(len(group.items) for group in todo))
        for group in todo:
            while (task := group.next_task()) is not None:
                group.add(task, ready().measure(task, scorer.exchange(task, states_of)))
            group.save(artifact)
            bar.advance(len(group.items))
    rows = saved_rows(wanted, artifact)
    return merge(rows + shortlist.rows(rows) if shortlist else rows, config, artifact)
