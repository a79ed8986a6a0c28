"""With `data.document_mask` a packed row gives what each of its documents gives alone, in every family and wherever rows are read."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from layer_trainers import rows_of, stream, trainer
from packed_text import SEPARATOR, documents, one_by_one, packed_ids
from small_models import save_parent, tiny_config
from torch.nn import functional as F

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.data.order import Tokens
from puzzle_ray.data.packing import positions_in_documents
from puzzle_ray.data.parts import heldout_parts
from puzzle_ray.distill.curriculum import of_length
from puzzle_ray.evaluation.breakdown import by_position
from puzzle_ray.evaluation.child_meter import ChildMeter
from puzzle_ray.evaluation.evaluate import predictions
from puzzle_ray.evaluation.reader import Reader
from puzzle_ray.evaluation.requests import Predictions, file_name
from puzzle_ray.families.registry import families
from puzzle_ray.models.blocks import load_stack, swapped
from puzzle_ray.models.child import assemble, load_model, new_child, read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.models.head import final_states
from puzzle_ray.models.masks import packed_arguments
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.fisher import shard_estimates
from puzzle_ray.scoring.metrics import compare_predictions, mean
from puzzle_ray.scoring.replacements import Damage
from puzzle_ray.scoring.serial import score_serially
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.scoring.shard import ShardScorer
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

IDS = packed_ids(2, 30)
POSITIONS = positions_in_documents(IDS, SEPARATOR)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
MODELS = {name: (name, {}) for name in sorted(families())} | {
    "gemma3, full": ("gemma3_text", {"layer_types": ["full_attention"] * 3}),
    "mistral, sliding": ("mistral", {"sliding_window": 6}),
    "phi3, sliding": ("phi3", {"sliding_window": 6}),
    "without a table": ("seed_oss", {}),
}


def test_positions_start_anew_at_every_document():
    ids = torch.tensor([[7, 8, 0, 9, 0, 0, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7]])
    assert positions_in_documents(ids, 0).tolist() == [[0, 1, 0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert positions_in_documents(ids, None) is None
    assert len(list(documents(IDS[0]))) == int((POSITIONS[0] == 0).sum()) > 3


def test_whoever_takes_a_part_of_tokens_knows_what_their_documents_begin_with():
    tokens = Tokens(np.zeros((40, 16), dtype=np.int32), separator=3)
    parts = [*tokens.split_validation(0, 8), *heldout_parts(tokens, 64, 64, 64), of_length(tokens, 32), of_length(tokens, 8)]
    assert [part.separator for part in parts] == [3] * len(parts)


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """(folder, config) of a random model."""
    name, changes = MODELS[request.param]
    folder = save_parent(tmp_path_factory.mktemp("model"), name, **changes)
    return folder, read_config(folder)


@torch.no_grad()
def test_hidden_states_and_logits_are_those_of_each_document_alone(model):
    """By layers, whose every output counts, and by the whole model."""
    folder, config = model
    stack = load_stack(folder, describe(config), config, 0, 3, torch.float32)

    def states(ids, position_ids=None):
        hidden = [stack.embed(ids, position_ids)]
        for index in range(3):
            hidden.append(stack.run_layer(stack.layer(index), index, hidden[-1], position_ids=position_ids))
        return torch.cat([*hidden, stack.final(hidden[-1]), stack.logits(hidden[-1])], dim=-1)

    found, whole = states(IDS, POSITIONS), load_model(folder)
    torch.testing.assert_close(found, one_by_one(states, IDS), **CLOSE)
    assert not torch.allclose(found, states(IDS), atol=1e-2), "documents that see each other give something else"
    final = final_states(whole, IDS, POSITIONS)
    torch.testing.assert_close(final, one_by_one(lambda ids: final_states(whole, ids), IDS), **CLOSE)
    torch.testing.assert_close(final, found[..., -96 - 32 : -96], **CLOSE)
    logits = whole(IDS, **packed_arguments(whole, IDS, POSITIONS), use_cache=False).logits
    torch.testing.assert_close(logits, found[..., -96:], **CLOSE)


@torch.no_grad()
def test_a_childs_too(model):
    _, config = model
    torch.manual_seed(0)
    child = new_child(
        config, [LayerChoice("gqa:1"), LayerChoice("noop", "ffn:24"), LayerChoice("linear", "linear")], torch.float32
    )
    found = final_states(child.eval(), IDS, POSITIONS)
    torch.testing.assert_close(found, one_by_one(lambda ids: final_states(child, ids), IDS), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_window_of_a_layers_own_ends_at_its_document(family, attention):
    torch.manual_seed(0)
    child = new_child(
        tiny_config(family), [LayerChoice("window:4"), LayerChoice(), LayerChoice("window:6")], torch.float32
    ).eval()
    child.set_attn_implementation(attention)
    found = final_states(child, IDS, POSITIONS)
    torch.testing.assert_close(found, one_by_one(lambda ids: final_states(child, ids), IDS), **CLOSE)


# --- scores, measurements, evaluation


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """(parent's stack, its folder, variants of its layers, random weights of theirs by layer and choice)."""
    folder = save_parent(tmp_path_factory.mktemp("parent"))
    config = read_config(folder)
    descriptor, states = describe(config), {}

    def states_of(layer, choice):
        if (layer, choice) not in states:
            torch.manual_seed(len(states))
            child = new_child(config, [choice] * 3, torch.float32)
            own = child.get_submodule(descriptor.layers)[layer].state_dict()
            names = {kind: descriptor.prefixes(kind) for kind in choice.replaced}
            states[layer, choice] = {kind: {n: v for n, v in own.items() if n.startswith(of)} for kind, of in names.items()}
        return states[layer, choice]

    stack = load_stack(folder, descriptor, config, 0, 3, torch.float32)
    return stack, folder, search_space(config, ("gqa:1", "noop"), ("ffn:24",), 8), states_of


def read_alone(stack, exchanged):
    """(outputs of the final norm, logits) of a child with some layers exchanged; it reads one document at a time."""

    def run(ids):
        hidden = stack.embed(ids)
        for index in range(3):
            hidden = stack.run_layer(exchanged.get(index, stack.layer(index)), index, hidden)
        return stack.final(hidden)

    with torch.no_grad():
        final = one_by_one(run, IDS)
        return final, stack.output_head.logits(final)


def figures(stack, exchanged):
    """What a child with exchanged layers makes worse, by whole logits."""
    (parent, logits), (own, damaged) = read_alone(stack, {}), read_alone(stack, exchanged)
    log_probs = logits.log_softmax(-1)
    before = compare_predictions(log_probs, logits, IDS, parent, parent)
    return Damage.of(compare_predictions(log_probs, damaged, IDS, parent, own), before.lm_loss)


@pytest.mark.parametrize("together", [1, 3])
def test_scores_are_those_of_documents_one_by_one(library, tmp_path, together):
    stack, _, space, states_of = library
    settings = ScoringConfig(tokens=60, micro_batch_tokens=60, candidate_batch=together)
    artifact = Store(str(tmp_path)).artifact("scores", {}, {})
    scores = score_serially(stack, [IDS], space, settings, artifact, states_of, Quiet(), separator=SEPARATOR)
    rows = {(row.layer, row.attention, row.ffn, row.metric): row.value for row in scores.rows}
    assert len(rows) == 3 * 3 * 7
    for layer, attention, ffn in {key[:3] for key in rows}:
        choice = LayerChoice(attention, ffn)
        swap = swapped(stack.layer(layer), choice, stack.descriptor, stack.config, states_of(layer, choice))
        for metric, values in figures(stack, {layer: swap}).values.items():
            assert rows[layer, attention, ffn, metric] == pytest.approx(mean(values), rel=1e-3, abs=2e-5), metric


def test_estimates_are_those_of_rows_that_are_one_document_each(library, tmp_path):
    """Rows of two documents of the same length against rows of one."""
    stack, _, space, states_of = library
    alone = packed_ids(4, 12, seed=1).masked_fill_(packed_ids(4, 12, seed=1) == SEPARATOR, 5)
    alone[:, 0] = SEPARATOR
    found = []
    for ids in (alone, alone.view(2, 24)):
        scorer = ShardScorer(stack, [ids], separator=SEPARATOR)
        scorer.run_parent()
        gradients = [[torch.randn(4, 12, 32, generator=torch.Generator().manual_seed(0)).view(len(ids), -1, 32)]]
        estimates, _ = shard_estimates(scorer, [0], gradients, space, ScoringConfig(), states_of)
        found.append({key: mean(values) for key, values in estimates.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-3) and len(set(found[0].values())) > 5


def test_variants_learn_of_packed_rows_what_they_learn_of_documents_alone(parent_folder):
    """Calibration, training, validation and the look at a change of the input: of rows of two documents, and of rows of one."""
    alone, packed = trainer(parent_folder), trainer(parent_folder)
    position_ids = torch.arange(8).repeat(2, 2)
    for position, x, _ in stream(alone, range(alone.schedule.positions)):
        x = x.view(4, 8, 32)
        with torch.no_grad():
            y = alone.stack.run_layer(alone.layer, alone.index, x)
        alone.step(position, x, y)
        packed.step(position, x.view(2, 16, 32), y.view(2, 16, 32), position_ids)
    rows = rows_of(alone), rows_of(packed)
    for name, row in rows[0].items():
        other = rows[1][name]
        for figure in ("start_loss", "final_loss", "singular_value"):
            assert getattr(other, figure) == pytest.approx(getattr(row, figure), rel=1e-2, abs=1e-6), (name, figure)
    assert len(rows[0]) == 6


def test_whole_children_are_measured_and_evaluated_by_document(library, tmp_path):
    stack, folder, _, states_of = library
    choices = (LayerChoice("gqa:1"), LayerChoice("noop", "ffn:24"), LayerChoice(ffn="ffn:24"))
    swaps = {n: swapped(stack.layer(n), c, stack.descriptor, stack.config, states_of(n, c)) for n, c in enumerate(choices)}
    expected = figures(stack, swaps).values
    found = ChildMeter(stack, SimpleNamespace(states=states_of), [IDS], separator=SEPARATOR).measure(choices)
    assert found.kl == pytest.approx(mean(expected["kl"]), rel=1e-3)
    assert found.lm_loss == pytest.approx(mean(expected["lm_loss"]), rel=1e-3, abs=1e-5)

    config = read_config(folder)
    trained = {(n, kind): state for n, c in enumerate(choices) for kind, state in states_of(n, c).items()}
    child, parent = assemble(folder, config, choices, trained, torch.float32), load_model(folder)
    kept = predictions({"parent": parent, "child": child}, [IDS], separator=SEPARATOR)
    assert kept["child"]["kl"] == pytest.approx(found.kl, rel=1e-4)
    assert predictions({"parent": parent, "child": child}, [IDS])["child"]["kl"] != pytest.approx(found.kl, rel=1e-2)

    byte_tokenizer().save_pretrained(folder)
    answer = Reader(str(folder), 30).answer(Predictions(IDS.numpy(), SEPARATOR))
    loss = F.cross_entropy(read_alone(stack, {})[1][:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none")
    np.testing.assert_allclose(answer["loss"].reshape(-1), loss.numpy(), atol=1e-4)


def test_an_answer_to_text_that_is_read_by_document_is_kept_under_a_name_of_its_own():
    ids = IDS.numpy()
    names = [file_name(("parent", chunk)) for chunk in (Predictions(ids), Predictions(ids, 0), Predictions(ids, 1))]
    assert len(set(names)) == 3
    assert Predictions(ids).to_json() == ["predictions", ids.tolist()], "as before there was a mask"


def test_positions_are_counted_in_documents():
    rows = [[1] * 20 + [0] + [1] * 11 + [0, 1]]
    ids = np.array(rows)
    answers = {"parent": {"loss": np.zeros((1, 33)), "best": np.zeros((1, 33), dtype=np.int32)}}
    counted = {row["bucket"]: row["tokens"] for row in by_position(answers, ids, 0)}
    assert counted == {"1 to 15": 15 + 12 + 1, "16 to 31": 5}
    assert {row["bucket"]: row["tokens"] for row in by_position(answers, ids)} == {"1 to 15": 15, "16 to 31": 16, "32 to 63": 2}
