"""Scoring holds one chunk of text: chunks change no score, are taken up again, and are as large as their bytes allow."""

import pytest
import torch
from small_models import save_parent, tiny_config

from puzzle_ray.artifacts import KINDS, PARENT
from puzzle_ray.models.blocks import load_stack, subblock_state
from puzzle_ray.models.child import new_child, read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.models.head import CHUNK_ELEMENTS, Head, chunk_tokens
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.metrics import compare_heads, compare_predictions, compare_with_parent
from puzzle_ray.scoring.plan import chunks_of_rounds, kept_bytes_per_token, shard_bytes
from puzzle_ray.scoring.serial import SerialScorer, score_serially
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.scoring.shard import ShardScorer
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

TEXTS = [torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(n)) for n in range(5)]


@pytest.fixture(scope="module")
def parent(parent_folder):
    config = read_config(parent_folder)
    descriptor = describe(config)
    stack = load_stack(parent_folder, descriptor, config, 0, 3, torch.float32)
    space = search_space(config, ("gqa:1", "noop"), ("ffn:24", "noop"), 8)

    def states_of(layer, choice):
        torch.manual_seed(layer)
        child = new_child(config, [choice] * 3, torch.float32).model.layers[layer]
        return {k: subblock_state(child, k, descriptor) for k in KINDS if choice.variant(k) != PARENT}

    return stack, space, states_of


def limited(monkeypatch, num_batches):
    """Makes chunks of so many of the texts."""
    each = TEXTS[0].numel() * kept_bytes_per_token(tiny_config(), range(3), "float32")
    monkeypatch.setattr("puzzle_ray.scoring.plan.CPU_CHUNK_BYTES", num_batches * each)


OPTIONS = [
    {"granularity": "block"},
    {"candidate_batch": 3},
    {"racing": True, "racing_stderr": 0.08, "candidate_batch": 2},
    {"shortlist": "fisher", "fisher_samples": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_size_of_chunks_changes_no_bit_and_only_one_is_remembered(parent, tmp_path, monkeypatch, options):
    stack, space, states_of = parent
    config, store = ScoringConfig(**options), Store(str(tmp_path))
    whole = score_serially(stack, TEXTS, space, config, store.artifact("scores", {}, {}), states_of, Quiet())
    for size in (1, 2, 3):
        limited(monkeypatch, size)
        remembered = []
        run = SerialScorer._remember
        monkeypatch.setattr(
            SerialScorer,
            "_remember",
            lambda self, b, run=run, seen=remembered: (run(self, b), seen.append(len(self.shard.inputs))),
        )
        step = store.artifact("scores", {"size": size}, {})
        assert score_serially(stack, TEXTS, space, config, step, states_of, Quiet()) == whole
        assert max(remembered) == min(size, 2 if config.racing else 3) and not step.names(
            "parts"
        )  # rounds of racing are 1, 1, 2, 1
        monkeypatch.undo()


@pytest.mark.parametrize("racing", [False, True])
def test_an_interrupted_run_goes_on_in_other_chunks_and_measures_nothing_twice(parent, tmp_path, monkeypatch, racing):
    stack, space, states_of = parent
    config, store = ScoringConfig(racing=racing, racing_stderr=0.08), Store(str(tmp_path))
    whole = score_serially(stack, TEXTS, space, config, store.artifact("scores", {}, {}), states_of, Quiet())
    step = store.artifact("scores", {"interrupted": True}, {})
    measured = []

    def counting(shard, task, leaving, inner):
        measured.extend((r, batch) for r in task.replacements for batch in task.batches)
        if len(measured) == 17:
            raise KeyboardInterrupt
        return inner(shard, task, leaving)

    inner = ShardScorer.measure
    monkeypatch.setattr(ShardScorer, "measure", lambda shard, task, leaving: counting(shard, task, leaving, inner))
    limited(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        score_serially(stack, TEXTS, space, config, step, states_of, Quiet())
    assert step.names("parts") and (racing or not step.names("items"))
    limited(monkeypatch, 2)
    assert score_serially(stack, TEXTS, space, config, step, states_of, Quiet()) == whole
    assert len(measured) == len(set(measured)) + 1, "only the interrupted one was measured twice"
    assert step.finished and not [name for name in step.record().files if name.startswith("parts")]


def test_chunks_are_whole_batches_within_the_limit():
    rounds = [(0, 5), (1,), (2, 3, 4)]
    found = chunks_of_rounds(rounds, [10, 10, 10, 10, 30, 4], 2, 45)
    assert [(c.round, c.batches) for c in found] == [(0, (0, 5)), (1, (1,)), (2, (2, 3)), (2, (4,))]
    assert [c.batches for c in chunks_of_rounds(rounds, [10] * 6, 2, 1)] == [(0,), (5,), (1,), (2,), (3,), (4,)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2"])
def test_predictions_a_few_tokens_at_a_time_are_those_of_whole_logits(family, tmp_path, monkeypatch):
    extra = {"gemma2": {"final_logit_softcapping": 3.0}, "granite": {"logits_scaling": 16.0}}.get(family, {})
    folder = save_parent(tmp_path, family, **extra)
    config = read_config(folder)
    stack = load_stack(folder, describe(config), config, 2, 3, torch.float32)
    generator = torch.Generator().manual_seed(0)
    own, child = (torch.randn(3, 16, 32, generator=generator) for _ in range(2))
    with torch.no_grad():
        head, ids = stack.output_head, TEXTS[0][:3]
        log_probs = torch.log_softmax(head.logits(own), -1)
        expected = compare_predictions(log_probs, head.logits(child), ids, own, child)
        assert compare_with_parent(log_probs, head, ids, own, child) == expected == compare_heads(head, head, ids, own, child)
        assert torch.equal(head.log_probs(own), log_probs)
        monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 5 * 96)
        assert chunk_tokens(96, torch.device("cpu")) == 5
        parts = list(head.chunks(child))
        assert [part.stop - part.start for part, _ in parts] == [5] * 9 + [3]
        assert max(logits.numel() for _, logits in parts) == 5 * 96
        for found in (compare_with_parent(log_probs, head, ids, own, child), compare_heads(head, head, ids, own, child)):
            assert found.tokens == expected.tokens and found.top1_agreement == expected.top1_agreement
            assert found.kl == pytest.approx(expected.kl, rel=1e-5) and found.lm_loss == pytest.approx(expected.lm_loss, rel=1e-5)


def test_a_models_head_is_found_in_every_family_and_gives_its_logits(tmp_path):
    from puzzle_ray.families.registry import families
    from puzzle_ray.models.child import load_model
    from puzzle_ray.models.head import final_states

    for family in families():
        model = load_model(save_parent(tmp_path / family, family), torch.float32)
        with torch.no_grad():
            found = Head.of(model).logits(final_states(model, TEXTS[0]))
            assert torch.equal(found, model(TEXTS[0], use_cache=False).logits), family


def test_bytes_of_a_shard_are_those_of_the_loaded_one(parent_folder):
    config = read_config(parent_folder)
    descriptor = describe(config)
    for layers, dtype in ((range(3), "float32"), (range(1), "bfloat16"), (range(1, 3), "float32")):
        scoring = ScoringConfig(dtype=dtype, chunk_mib=1)
        stack = load_stack(parent_folder, descriptor, config, layers.start, layers.stop, getattr(torch, dtype))
        found = shard_bytes(config, descriptor, layers, scoring, 64, None)
        held = {p.data_ptr(): p.nbytes for p in stack.parameters()}
        assert found.weights == sum(held.values()) and found.kept == 2**20
    text = ScoringConfig(tokens=256)
    few = shard_bytes(config, descriptor, range(3), text, 64, None)
    assert few.kept == 256 * kept_bytes_per_token(config, range(3), "float32"), "no chunk is longer than the text"
    drawing = shard_bytes(config, descriptor, range(3), text.model_copy(update={"shortlist": "fisher"}), 1 << 20, None)
    assert drawing.working - few.working > (2 << 20) * config.vocab_size * 4, "labels are drawn from whole probabilities"
    stack = load_stack(parent_folder, descriptor, config, 0, 3, torch.float32)
    scorer = ShardScorer(stack, TEXTS)
    scorer.run_parent(batches=(0, 1))
    kept = [x for number in (0, 1) for x in scorer.inputs[number].values()]
    kept += [x for number in (0, 1) for x in (scorer.parent[number].log_probs, scorer.parent[number].hidden)]
    assert sum(x.nbytes for x in kept) == 128 * kept_bytes_per_token(config, range(3), "float32")
