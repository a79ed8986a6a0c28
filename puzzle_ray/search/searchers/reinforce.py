"""Policy gradient (REINFORCE): rows are decided in order by softmax policies that see how much of each budget is left.

Shapes: M limits, R rows, V choices, E episodes. Row r's logits are theta[r] + sum_m state[m] phi[r, m]; state m is the
budget left, less what the later rows need at least, as a share of what they could use: 0 leaves no choice, 1 all.
A choice that leaves the later rows too little of any one budget is never drawn.
"""

from __future__ import annotations

import time

import numpy as np

from puzzle_ray.search.problem import Choice, Floats, Problem, Solution, unmet, verified
from puzzle_ray.search.relaxation import lower_bound, span_of
from puzzle_ray.search.searcher import Options
from puzzle_ray.search.searchers.random_search import repaired_at_random

EPISODES = 64
SAMPLES_PER_UPDATE = 4  # `options.samples` = 1000 makes 250 updates
LEARNING_RATE = 0.15
BETAS = (0.9, 0.99)
SHARPNESS = 4.0  # the rewards' standard score is multiplied by this over the batch's size


class Policy:
    """The parameters, and Adam's moments of them."""

    def __init__(self, problem: Problem, random: np.random.Generator) -> None:
        self.score, (self.rows, self.bounds) = problem.score, problem.rows()
        self.random = random
        finite = np.isfinite(self.score)
        least = np.where(finite, self.rows, np.inf).min(axis=2)
        most = np.where(finite, self.rows, -np.inf).max(axis=2)
        self.least_later = np.cumsum(least[:, ::-1], axis=1)[:, ::-1] - least  # [M, R]: what the rows behind need
        self.span = np.cumsum((most - least)[:, ::-1], axis=1)[:, ::-1]  # [M, R]: what this row and those behind could use
        self.span[self.span <= 0] = 1.0
        self.least = least
        self.weights = np.zeros((len(self.score), len(self.bounds) + 1, self.score.shape[1]))  # theta, then phi
        self.moments = np.zeros((2, *self.weights.shape))
        self.updates = 0

    def play(self) -> tuple[Choice, Floats]:
        """E episodes: choices [E, R] and the gradient of each one's log-probability [E, R, 1 + M, V]."""
        episodes = np.arange(EPISODES)
        left = np.tile(self.bounds[:, None], (1, EPISODES))
        choices = np.zeros((EPISODES, len(self.score)), dtype=np.intp)
        gradients = np.zeros((EPISODES, *self.weights.shape))
        for row in range(len(self.score)):
            needed = (self.least_later[:, row] + self.least[:, row])[:, None]
            state = np.concatenate([np.ones((1, EPISODES)), np.clip((left - needed) / self.span[:, row, None], 0.0, 1.0)])
            logits = state.T @ self.weights[row]
            after = left[:, :, None] - self.rows[:, row][:, None, :] - self.least_later[:, row][:, None, None]
            allowed = np.isfinite(self.score[row]) & (after >= -1e-12).all(axis=0)
            allowed[~allowed.any(axis=1)] = np.isfinite(self.score[row])  # limits clash: go on, the answer is repaired
            logits = np.where(allowed, logits, -np.inf)
            chances = np.exp(logits - logits.max(axis=1, keepdims=True))
            chances /= chances.sum(axis=1, keepdims=True)
            below = np.cumsum(chances, axis=1)
            draws = below[:, -1:] * self.random.random((EPISODES, 1))
            picked = np.minimum((below <= draws).sum(axis=1), chances.shape[1] - 1)  # never one of no chance
            choices[:, row] = picked
            slope = -chances
            slope[episodes, picked] += 1.0
            gradients[:, row] = state.T[:, :, None] * slope[:, None, :]
            left = left - self.rows[:, row, picked]
        return choices, gradients

    def learn(self, gradients: Floats, rewards: Floats) -> None:
        """One Adam step up the expected reward; the baseline is the batch's mean."""
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-12)
        ascent = np.tensordot(advantages, gradients, 1) * (SHARPNESS / EPISODES)
        self.updates += 1
        for moment, beta, value in zip(self.moments, BETAS, (ascent, ascent**2), strict=True):
            moment += (1 - beta) * (value - moment)
        first, second = (m / (1 - beta**self.updates) for m, beta in zip(self.moments, BETAS, strict=True))
        self.weights += LEARNING_RATE * first / (np.sqrt(second) + 1e-8)


class _Reinforce:
    name = "reinforce"

    def solve(self, problem: Problem, options: Options) -> Solution:
        """The best choice any episode made, the same for the same seed. Raises Infeasible if none is within the limits."""
        started = time.perf_counter()
        deadline = started + (options.time_limit_s or np.inf)
        problem.check_each_limit()
        random = np.random.default_rng(options.seed)
        policy, span = Policy(problem, random), span_of(problem.score) * len(problem.score)
        best: Choice | None = None
        tries: list[Choice] = []
        for _ in range(max(1, options.samples // SAMPLES_PER_UPDATE)):
            choices, gradients = policy.play()
            rewards = np.zeros(EPISODES)
            for episode, choice in enumerate(choices):
                fixed = repaired_at_random(problem.score, policy.rows, policy.bounds, choice, random)
                rewards[episode] = -problem.objective(fixed) / span
                if problem.violated(fixed):
                    rewards[episode] -= 1.0
                    tries.append(fixed)
                elif best is None or problem.objective(fixed) < problem.objective(best):
                    best = fixed
            policy.learn(gradients, rewards)
            if time.perf_counter() > deadline:
                break
        if best is None:
            raise unmet(problem, tries, f"none of {len(tries)} episodes comes nearer; another searcher may")
        return verified(problem, best, lower_bound(problem), "heuristic", time.perf_counter() - started, self.name)


SEARCHER = _Reinforce()
