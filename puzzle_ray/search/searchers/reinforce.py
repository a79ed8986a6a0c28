"""Policy gradient (REINFORCE): rows are decided in order by softmax policies that see how much of each budget is left.

Shapes: M limits, R rows, V choices, E episodes.
The logits of row r are theta[r] + sum_m state[m] phi[r, m]. state[m] is the budget left, less the least that the later rows need, as
a share of what they could use at most: at 0 there is no choice, and at 1 there is every choice.
A choice is never drawn where it leaves the later rows too little of any one budget.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from puzzle_ray.search.problem import Choice, Floats, Problem, Solution, nearest_miss, verified_solution
from puzzle_ray.search.relaxation import Bools, lower_bound, span_of
from puzzle_ray.search.searcher import Options
from puzzle_ray.search.searchers.random_search import repaired_at_random

if TYPE_CHECKING:
    import torch

EPISODES = 64
SAMPLES_PER_UPDATE = 4  # `options.samples` = 1000 makes 250 updates
LEARNING_RATE = 0.15
BETAS = (0.9, 0.99)
SHARPNESS = 4.0  # factor of the mean of (standardised reward x log-probability) over a batch of episodes


@dataclass(frozen=True, eq=False)
class Episodes:
    """E episodes: `choices` [E, R], and for every decision the policy's input `states` [R, E, 1 + M] and what was `allowed` [R, E, V]."""

    choices: NDArray[np.intp]
    states: Floats
    allowed: Bools


class Policy:
    """The policy's weights [R, 1 + M, V] (theta, then phi), trained by Adam on the gradient of the expected reward."""

    def __init__(self, problem: Problem, random: np.random.Generator) -> None:
        import torch

        self.score, (self.rows, self.bounds) = problem.score, problem.rows()
        self.random = random
        finite = np.isfinite(self.score)
        self.lowest = np.where(finite, self.rows, np.inf).min(axis=2)
        highest = np.where(finite, self.rows, -np.inf).max(axis=2)
        self.lowest_later = (
            np.cumsum(self.lowest[:, ::-1], axis=1)[:, ::-1] - self.lowest
        )  # [M, R]: the least that later rows need
        self.span = np.cumsum((highest - self.lowest)[:, ::-1], axis=1)[:, ::-1]  # [M, R]: what this and the later rows could use
        self.span[self.span <= 0] = 1.0
        shape = (len(self.score), len(self.bounds) + 1, self.score.shape[1])
        self.weights = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.weights], lr=LEARNING_RATE, betas=BETAS)

    def play(self) -> Episodes:
        """Draws E episodes from the policy."""
        weights = self.weights.detach().numpy()
        left = np.tile(self.bounds[:, None], (1, EPISODES))
        choices = np.zeros((EPISODES, len(self.score)), dtype=np.intp)
        all_states, all_allowed = [], []
        for row in range(len(self.score)):
            needed = (self.lowest_later[:, row] + self.lowest[:, row])[:, None]
            shares = np.clip((left - needed) / self.span[:, row, None], 0.0, 1.0)
            states = np.concatenate([np.ones((1, EPISODES)), shares]).T
            after = left[:, :, None] - self.rows[:, row][:, None, :] - self.lowest_later[:, row][:, None, None]
            allowed = np.isfinite(self.score[row]) & (after >= -1e-12).all(axis=0)
            allowed[~allowed.any(axis=1)] = np.isfinite(self.score[row])  # limits clash: go on, the answer is repaired
            logits = np.where(allowed, states @ weights[row], -np.inf)
            chances = np.exp(logits - logits.max(axis=1, keepdims=True))
            below = np.cumsum(chances / chances.sum(axis=1, keepdims=True), axis=1)
            draws = below[:, -1:] * self.random.random((EPISODES, 1))
            drawn = np.minimum((below <= draws).sum(axis=1), below.shape[1] - 1)  # a choice of probability 0 is never drawn
            choices[:, row] = drawn
            left = left - self.rows[:, row, drawn]
            all_states.append(states)
            all_allowed.append(allowed)
        return Episodes(choices, np.stack(all_states), np.stack(all_allowed))

    def log_probabilities(self, episodes: Episodes) -> torch.Tensor:
        """Every episode's log-probability under the policy [E]."""
        import torch

        logits = torch.from_numpy(episodes.states) @ self.weights  # [R, E, V]
        logits = logits.masked_fill(~torch.from_numpy(episodes.allowed), -torch.inf)
        drawn = torch.from_numpy(episodes.choices.T.copy())[:, :, None]
        return logits.log_softmax(dim=2).gather(2, drawn).sum(dim=(0, 2))

    def learn(self, episodes: Episodes, rewards: Floats) -> None:
        """One Adam step towards a higher expected reward. The baseline is the mean reward of the batch."""
        import torch

        advantages = torch.from_numpy((rewards - rewards.mean()) / (rewards.std() + 1e-12))
        loss = -SHARPNESS * (advantages * self.log_probabilities(episodes)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes in one thread. A policy is so small that more threads would mostly wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Reinforce:
    name = "reinforce"

    def solve(self, problem: Problem, options: Options) -> Solution:
        """The best choice of any episode, the same for the same seed. Raises Infeasible if none is within the limits."""
        started = time.perf_counter()
        problem.check_each_limit()
        with one_thread():
            best, tries = self._train(problem, options, started + (options.time_limit_s or np.inf))
        if best is None:
            raise nearest_miss(problem, tries, f"none of {len(tries)} episodes comes nearer; another searcher may")
        return verified_solution(problem, best, lower_bound(problem), "heuristic", time.perf_counter() - started, self.name)

    def _train(self, problem: Problem, options: Options, deadline: float) -> tuple[Choice | None, list[Choice]]:
        """The best choice within the limits, or None, and the choices that break a limit."""
        random = np.random.default_rng(options.seed)
        policy, span = Policy(problem, random), span_of(problem.score) * len(problem.score)
        best: Choice | None = None
        tries: list[Choice] = []
        for _ in range(max(1, options.samples // SAMPLES_PER_UPDATE)):
            episodes = policy.play()
            rewards = np.zeros(EPISODES)
            for episode, choice in enumerate(episodes.choices):
                repaired = repaired_at_random(problem.score, policy.rows, policy.bounds, choice, random)
                rewards[episode] = -problem.objective(repaired) / span
                if problem.violated(repaired):
                    rewards[episode] -= 1.0
                    tries.append(repaired)
                elif best is None or problem.objective(repaired) < problem.objective(best):
                    best = repaired
            policy.learn(episodes, rewards)
            if time.perf_counter() > deadline:
                break
        return best, tries


SEARCHER = _Reinforce()
