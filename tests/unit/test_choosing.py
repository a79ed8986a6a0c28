"""Tokens are drawn as the settings say, for every number that a setting may have, and a request's draws are its own."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle_ray.errors import ConfigError
from puzzle_ray.serving.choosing import NOT_A_TOKEN, Chooser, uniform
from puzzle_ray.serving.sampling import MAX_LOGPROBS, SamplingParams

VOCAB = 7
ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True, width=64)
HIDDEN = float("-inf")


def choose(logits, params, positions=None, seeds=None, seen=None):
    count = len(params)
    seen = seen or [((), ())] * count
    chooser = Chooser(params, seeds or list(range(count)), seen, logits.shape[1], torch.device("cpu"))
    return chooser.choose(logits, np.arange(count) if positions is None else positions)


def shares(logits, **asked):
    """How often each token is drawn by 20,000 requests."""
    count = 20_000
    ids = choose(logits.expand(count, -1), [SamplingParams(**asked)] * count).token_ids
    return torch.bincount(ids, minlength=len(logits)) / count


def test_a_draw_inverts_the_distribution():
    logits = torch.tensor([0.1, 2.0, -1.0, 0.7, 1.1])

    def near(found, expected):
        return torch.allclose(found, expected, atol=0.015)  # four standard deviations of a share of 20,000 draws

    assert near(shares(logits), logits.softmax(0))
    assert near(shares(logits, temperature=0.7), (logits / 0.7).softmax(0))
    assert near(shares(logits, top_k=2), logits.masked_fill(logits < 1, HIDDEN).softmax(0))
    assert shares(logits, top_p=0.5).tolist() == shares(logits, top_k=1).tolist() == shares(logits, temperature=0).tolist()
    both = shares(
        logits, top_k=3, top_p=0.8
    )  # of the three likeliest: 0.55, 0.22, 0.15, that is 0.60, 0.24, 0.16 among themselves
    assert near(both, logits.masked_fill(logits < 1, HIDDEN).softmax(0))
    assert near(shares(logits, min_p=0.4), logits.masked_fill(logits < 1, HIDDEN).softmax(0))  # 1.1 has 0.41 of the likeliest's
    assert near(shares(logits, logit_bias=((2, 3.0),)), (logits + torch.tensor([0, 0, 3.0, 0, 0])).softmax(0))


def test_draws_are_uniform_and_differ_by_seed_and_position():
    grid = uniform(np.arange(300, dtype=np.uint64).repeat(300), np.tile(np.arange(300), 300))
    assert 0 <= grid.min() < 1e-4 and 1 - 1e-4 < grid.max() < 1
    assert abs(grid.mean() - 0.5) < 0.004 and abs(grid.std() - 12**-0.5) < 0.004
    assert len(np.unique(grid)) > 0.99 * len(grid)
    square = grid.reshape(300, 300)
    assert abs(np.corrcoef(square[:-1].ravel(), square[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(square[:, :-1].ravel(), square[:, 1:].ravel())[0, 1]) < 0.02


@st.composite
def requests(draw):
    """Settings of any floats and integers that are not refused."""
    fields = {
        "temperature": ANY_FLOAT,
        "top_p": ANY_FLOAT,
        "min_p": ANY_FLOAT,
        "top_k": st.integers(-1, 10**30),
        "presence_penalty": ANY_FLOAT,
        "frequency_penalty": ANY_FLOAT,
        "repetition_penalty": ANY_FLOAT,
        "logit_bias": st.lists(st.tuples(st.integers(0, VOCAB - 1), ANY_FLOAT), max_size=3).map(tuple),
        "logprobs": st.none() | st.integers(-1, MAX_LOGPROBS + 1),
    }
    asked = {}
    for name, values in fields.items():
        value = draw(st.just(None) | values)
        if value is not None:
            try:
                SamplingParams(**{name: value})
            except ConfigError:
                continue
            asked[name] = value
    return SamplingParams(**asked)


@given(
    params=st.lists(requests(), min_size=1, max_size=4),
    logits=st.lists(st.floats(width=32), min_size=4 * VOCAB, max_size=4 * VOCAB),
    seed=st.integers(-(2**70), 2**70),
)
@settings(max_examples=150, deadline=None)
def test_no_number_ends_more_than_its_own_request(params, logits, seed):
    """Whatever floats settings and logits hold, every row gets a token that it may have. Only rows without finite maximum get none."""
    table = torch.tensor(logits).reshape(4, VOCAB)[: len(params)]
    seen = [((0, 1), (1, 1, 2))] * len(params)
    chosen = choose(table, params, seeds=[seed] * len(params), seen=seen)
    for row, (token_id, request) in enumerate(zip(chosen.token_ids.tolist(), params, strict=True)):
        sound = bool(table[row].max().isfinite()) and not table[row].isnan().any()
        if sound and not request.penalised:  # penalties may take finite numbers beyond float32
            assert 0 <= token_id < VOCAB and table[row, token_id] > HIDDEN
        assert token_id == NOT_A_TOKEN or 0 <= token_id < VOCAB
        if not sound and not request.penalised:
            assert token_id == NOT_A_TOKEN
        alone = choose(table[row : row + 1], [request], np.array([row]), [seed], seen[:1])
        assert alone.token_ids.tolist() == [token_id]


@given(value=ANY_FLOAT)
@settings(max_examples=200, deadline=None)
def test_every_float_is_a_setting_or_refused_by_name(value):
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        try:
            params = SamplingParams(**{name: value})
        except ConfigError as error:
            assert error.args[0] == name
        else:
            assert math.isfinite(value)
            assert choose(torch.arange(VOCAB).float()[None], [params]).token_ids[0] >= 0


@pytest.mark.parametrize("top_p", [1e-46, 5e-324, 1e-8, 1.0])
def test_the_likeliest_token_is_always_left(top_p):
    assert choose(torch.tensor([[0.0, 1.0, 0.5]]), [SamplingParams(top_p=top_p, seed=1)]).token_ids[0] in range(3)


def test_penalties_are_those_of_their_definitions():
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0, 0.0, 1.0, -2.0]])
    prompt, answer = (0, 1), (3, 3, 5)
    asked = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 2.0, "logit_bias": ((6, 50.0),)}
    expected = torch.tensor([1.0, -2.0, 0.5, 1.5 - 0.5 - 0.5, 0.0, 0.5 - 0.5 - 0.25, 48.0])
    chooser = Chooser([SamplingParams(temperature=0, **asked)], [0], [(prompt, answer)], VOCAB, torch.device("cpu"))
    assert torch.equal(chooser._penalties.applied(logits)[0], expected)
    chooser.choose(logits, np.array([5]))  # token 6, which from now on is one of the answer's
    assert chooser._penalties.applied(logits)[0, 6] == -2.0 * 2 - 0.5 - 0.25 + 50


def test_log_probabilities_are_the_models_own():
    torch.manual_seed(0)
    logits = torch.randn(3, VOCAB)
    params = [
        SamplingParams(temperature=0, logprobs=2),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.1, logprobs=0),
    ]
    chosen = choose(logits, params)
    first, none, last = chosen.logprobs
    truth = logits.log_softmax(-1)
    assert first.token_id == chosen.token_ids[0] and first.logprob == pytest.approx(float(truth[0].max()))
    assert [token_id for token_id, _ in first.top] == truth[0].topk(2).indices.tolist()
    assert none is None and last.top == () and last.logprob == pytest.approx(float(truth[2, last.token_id]))
