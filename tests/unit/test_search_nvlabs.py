"""The authors' own 80 x 16 library, against optima that CBC and HiGHS proved."""

from __future__ import annotations

import json

import pytest

from benchmarks.nvlabs import read_nvlabs
from puzzle_ray.errors import ConfigError
from puzzle_ray.search.mip import solve_diverse, solve_exactly
from puzzle_ray.search.searcher import Options, find_searcher

OPTIMA = {
    "80 GB, 6000 tokens/s": ({"memory_mib": 80000, "throughput_tokens_per_s": 6000}, 6.861455318910885),
    "40 GB": ({"memory_mib": 40000}, 18.935023055790225),
    "85 % of both": ({"memory_fraction": 0.85, "runtime_fraction": 0.85}, 3.282072528876597),
    "50 % of both": ({"memory_fraction": 0.5, "runtime_fraction": 0.5}, 14.032297166151693),
}


@pytest.fixture(scope="module")
def library(shared_data):
    return read_nvlabs(shared_data / "nvlabs_llama70b")


@pytest.mark.parametrize("limits", OPTIMA)
def test_known_optima(library, limits):
    asked, optimum = OPTIMA[limits]
    solution = solve_exactly(library.problem(**asked))
    assert solution.objective == pytest.approx(optimum, rel=1e-9)
    assert solution.status == "optimal" and solution.gap <= 1e-12


def test_scores_are_differences_so_the_offset_gives_the_files_own_sum(library):
    solution = solve_exactly(library.problem("lm_loss", memory_mib=80000, throughput_tokens_per_s=6000))
    assert solution.objective + library.offset("lm_loss") == pytest.approx(131.41844929894432, rel=1e-12)


def test_ten_answers_ten_layers_apart(library):
    problem = library.problem(memory_mib=80000, throughput_tokens_per_s=6000)
    found = solve_diverse(problem, 10, 10)
    assert [s.status for s in found] == ["optimal"] * 10
    assert found[0].objective == pytest.approx(6.861455318910885, rel=1e-9)
    assert found[-1].objective == pytest.approx(6.867394542568945, rel=1e-9)
    for k, solution in enumerate(found):
        assert not problem.violated(solution.choice)
        assert all(problem.distance(solution.choice, earlier.choice) >= 10 for earlier in found[:k])


def test_baselines_at_46_percent_of_the_runtime(library):
    problem = library.problem(runtime_fraction=0.46)
    assert find_searcher("mip").solve(problem, Options()).objective == pytest.approx(15.634, abs=5e-4)
    assert find_searcher("greedy").solve(problem, Options()).objective == pytest.approx(52.26, abs=5e-3)
    most = find_searcher("max_params").solve(problem, Options())
    assert problem.spent(most.choice)[2] == 45_890_535_424  # most parameters; 58.86 is one of many scores they can have
    assert most.objective < 58.86


def test_a_library_in_its_format_is_read(tmp_path):
    """One layer, two variants: the reader keeps score differences and every cost."""
    stats = {"memory_mib": 4.0, "runtime_ms": 3.0, "num_params": 7}
    parent = {"stats": stats, "metrics": {"kl_div": 0.0, "lm_loss": 1.5}}
    less = {"memory_mib": 2.0, "runtime_ms": 1.0, "num_params": 3}
    small = {"stats": less, "metrics": {"kl_div": 0.5, "lm_loss": 1.75}}
    (tmp_path / "block_library.json").write_text(json.dumps({"layer_0": {"parent": parent, "small": small}}))
    (tmp_path / "parent_block_stats.json").write_text(json.dumps(parent))
    (tmp_path / "measurement_info.json").write_text(json.dumps({"batch_size": 2, "sequence_length": 3}))
    library = read_nvlabs(tmp_path)
    problem = library.problem("lm_loss", throughput_tokens_per_s=4000)
    solution = solve_exactly(problem)
    assert problem.spent(solution.choice) == [2.0, 1.0, 3.0]
    assert (solution.objective, library.offset("lm_loss")) == (0.25, 1.5)
    with pytest.raises(ConfigError, match="has no 'x'"):
        library.problem("x")


def test_a_folder_without_the_library_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_nvlabs(tmp_path)
