"""Racing: scores of replacements that stopped reading are comparable with the scores of those that read on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from puzzle_ray.artifacts import LayerChoice, ScoreRow
from puzzle_ray.scoring.plan import chunks_of_rounds
from puzzle_ray.scoring.racing import on_all_text
from puzzle_ray.scoring.replacements import Damage, Replacement, replacement_groups, saved_score_rows
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.store import Store

BATCHES, SEQUENCES, TOKENS = 16, 8, 128  # texts, sequences and tokens of each
NAMES = ("gqa:4", "gqa:2", "gqa:1", "linear", "noop")
# The first batch is easy text, all others are twice as hard or more.
HARDNESS = np.array([1.0] + [2.0, 2.2, 2.4, 2.6, 2.8] * 3)


def replacements(layers=1):
    return [Replacement(layer, LayerChoice(attention=name)) for layer in range(layers) for name in NAMES]


def damages_of(sizes, noise, seed=0):
    """KL and next-token damage of every sequence, [batches, sequences]: the replacement's size times the text's hardness, with noise.

    What makes one sequence of a batch harder than another makes it harder for all replacements.
    """
    rng = np.random.default_rng(seed)
    text = HARDNESS[:, None] * np.exp(0.03 * rng.standard_normal((BATCHES, SEQUENCES)))
    spread = {r: np.exp(noise[r] * rng.standard_normal(text.shape) - noise[r] ** 2 / 2) for r in sizes}
    kl = {r: sizes[r] * text * spread[r] for r in sizes}
    return kl, {r: -0.5 * values for r, values in kl.items()}


def raced(kl, loss, artifact, **settings):
    """Runs the groups on given damages, without a model, and saves them."""
    wanted = list(kl)
    config = ScoringConfig(racing=True, **settings)
    for group in replacement_groups(wanted, config, BATCHES, 0):
        for chunk in chunks_of_rounds(group.rounds, [TOKENS] * BATCHES, 1, 3 * TOKENS):
            task = group.task(chunk)
            if task is None:
                continue
            parts = []
            for r in task.replacements:
                values = [{"kl": tuple(kl[r][batch]), "lm_loss": tuple(loss[r][batch])} for batch in task.batches]
                parts.append([Damage(own, dict.fromkeys(own, TOKENS)) for own in values])
            group.add(task, parts)
        group.save(artifact)
    return {(r.layer, r.attention, r.metric): r for r in saved_score_rows(wanted, artifact)}


def plain_mean(values, row: ScoreRow) -> float:
    return float(values[: row.tokens // TOKENS].mean())


@pytest.mark.parametrize("together", [1, 2, 5])
def test_the_ranking_is_right_where_the_plain_means_are_wrong(tmp_path, together):
    """The larger a damage, the less noise it has here. So the worst ones stop on the easy text and look best."""
    sizes = dict(zip(replacements(), (1.0, 1.1, 1.2, 1.35, 1.5), strict=True))
    noise = dict(zip(sizes, (0.2, 0.2, 0.2, 0.02, 0.02), strict=True))
    kl, loss = damages_of(sizes, noise)
    rows = raced(kl, loss, Store(str(tmp_path)).artifact("scores", {}, {}), candidate_batch=together, racing_stderr=0.02)
    own = {r: rows[0, r.choice.attention, "kl"] for r in sizes}
    assert [row.tokens // TOKENS for row in own.values()] == [16, 16, 16, 1, 1]
    right = sorted(sizes, key=lambda r: kl[r].mean())
    assert sorted(sizes, key=lambda r: plain_mean(kl[r], own[r])) != right, "the means over what was read rank them wrong"
    assert sorted(sizes, key=lambda r: own[r].value) == right
    for r, row in own.items():
        assert row.value == pytest.approx(kl[r].mean(), rel=0.05)
        assert abs(math.log(plain_mean(kl[r], row) / kl[r].mean())) > 0.5 or row.tokens == 16 * TOKENS


def test_damage_that_may_be_negative_keeps_its_sign_and_grows_like_the_kl(tmp_path):
    sizes = dict(zip(replacements(), (1.0, 1.1, 1.2, 1.35, 1.5), strict=True))
    kl, loss = damages_of(sizes, dict.fromkeys(sizes, 0.02))
    rows = raced(kl, loss, Store(str(tmp_path)).artifact("scores", {}, {}))
    for r in sizes:
        assert rows[0, r.choice.attention, "lm_loss"].value == pytest.approx(-0.5 * kl[r].mean(), rel=0.03)
        assert rows[0, r.choice.attention, "lm_loss"].stderr >= 0


def test_every_layer_has_one_that_reads_all_text_and_layers_are_comparable(tmp_path):
    """Layer 1's damages are lower, all of its replacements could stop at once, and in layer 0 nobody can."""
    wanted = replacements(layers=2)
    sizes = {r: (1.0 if r.layer == 0 else 0.9) * (1 + 0.01 * n % 5) for n, r in enumerate(wanted)}
    kl, loss = damages_of(sizes, {r: 0.9 if r.layer == 0 else 0.0 for r in wanted})
    rows = raced(kl, loss, Store(str(tmp_path)).artifact("scores", {}, {}))
    of_kl = [row for key, row in rows.items() if key[2] == "kl"]
    assert all(row.tokens == 16 * TOKENS for row in of_kl if row.layer == 0)
    assert [row.tokens // TOKENS for row in of_kl if row.layer == 1] == [16, 1, 1, 1, 1]
    for r in wanted:
        assert rows[r.layer, r.choice.attention, "kl"].value == pytest.approx(kl[r].mean(), rel=1e-9)


def test_who_read_all_text_keeps_its_bits_and_one_round_changes_nothing():
    def row(name, value, tokens, metric="kl"):
        return ScoreRow(0, name, "parent", metric, value, 0.1, tokens)

    all_read = [[row("a", 0.3, 8), row("a", 0.1, 16)], [row("b", 0.2, 8), row("b", 0.7, 16)]]
    assert on_all_text(all_read) == [row("a", 0.1, 16), row("b", 0.7, 16)]
    one_round = [[row("a", 0.3, 8), row("a", -0.3, 8, "lm_loss")], [row("b", 0.0, 8), row("b", 0.5, 8, "lm_loss")]]
    assert on_all_text(one_round) == [x for history in one_round for x in history]


def test_growths_multiply_over_rounds_and_means_that_are_not_positive_say_nothing():
    def history(name, *values):
        return [ScoreRow(0, name, "parent", "kl", value, 0.0, 8 * 2**n) for n, value in enumerate(values)]

    found = on_all_text([history("a", 1.0, 2.0, 3.0), history("b", 2.0, 5.0), history("c", 4.0), history("zero", 0.0, 1.0, 0.0)])
    growth = math.sqrt((2.0 / 1.0) * (5.0 / 2.0))
    assert [row.value for row in found] == pytest.approx([3.0, 5.0 * 1.5, 4.0 * growth * 1.5, 0.0])
    assert [row.tokens for row in found] == [32, 16, 8, 32]
    nothing_known = on_all_text([history("zero", 0.0, 0.0), history("b", 2.0)])
    assert [row.value for row in nothing_known] == [0.0, 2.0]


def test_replacements_asked_for_one_by_one_read_all_text():
    alone = ScoringConfig(racing=True, candidate_batch=4).alone
    (group,) = replacement_groups(replacements()[:1], alone, BATCHES, 2)
    (chunk,) = chunks_of_rounds(group.rounds, [TOKENS] * (BATCHES + 2), 1, 10**9)
    assert group.task(chunk).batches == tuple(range(BATCHES + 2))
