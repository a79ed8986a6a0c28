"""Narrowing a search space to what earlier searches chose."""

import json
import shutil
from dataclasses import asdict, replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from search_inputs import FFN, PROFILE, SCENARIO, SCORES, SPACE
from small_runs import make_run, save_parent_with_text

from jobs.checks import check
from puzzle_ray.artifacts import PARENT, Architecture, LayerChoice, LayerSpace, Scores, SearchSpace, to_json
from puzzle_ray.config import load
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.errors import ConfigError
from puzzle_ray.scoring import fisher
from puzzle_ray.scoring.replacements import all_replacements
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.narrow import library_space, narrowed, read_architectures
from puzzle_ray.search.setup import SearchSetup
from puzzle_ray.search.sweep import Grid, finish_sweep, grid_points, point_name, solved_points
from puzzle_ray.search.tables import search_architectures
from puzzle_ray.store import Store
from puzzle_ray.variants.space import onward

HARD = Limits(speedup=1.5)


def found_within(limits=HARD, space=SPACE, scores=SCORES):
    return search_architectures(space, scores, PROFILE, SCENARIO, limits)[0]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A finished sweep, one of its budgets out of reach."""
    step = Store(str(tmp_path_factory.mktemp("store"))).artifact("sweep", {}, {})
    grid = Grid({(30, 11): SearchSetup(SPACE, SCORES, PROFILE, SCENARIO, "kl", "mip", 60.0, HARD)})
    points = grid_points({"speedup": [1.2, 1.5, 1000.0]})
    for point in points:
        step.write_json(point_name(point), grid.solve(point))
    finish_sweep(solved_points(points, step), step)
    return step


@pytest.fixture
def architecture_file(tmp_path):
    path = tmp_path / "architecture.json"
    path.write_bytes(to_json(found_within()))
    return path


def settings(source, **changes) -> LibraryConfig:
    return LibraryConfig(narrow_from=str(source), **changes)


def test_files_and_folders_of_a_sweep_say_the_same(sweep):
    expected = [found_within(Limits(speedup=value)).choices for value in (1.2, 1.5)]
    for name in ("", "/sweep.json", "/sweep.parquet"):
        assert read_architectures(sweep.url + name) == expected


def test_an_architecture_may_come_from_any_url(architecture_file):
    store = Store("memory://narrow")
    step = store.artifact("architecture", {}, {})
    step.write("architecture.json", architecture_file.read_bytes())
    assert read_architectures(step.url) == read_architectures(str(architecture_file)) == [found_within().choices]


def test_every_layer_keeps_the_parent_and_what_some_architecture_has_there(sweep):
    found = read_architectures(sweep.url)
    space = narrowed(SPACE, found)
    for index, layer in enumerate(space.layers):
        assert set(layer.attention) == {PARENT, *(choices[index].attention for choices in found)}
        assert set(layer.ffn) == {PARENT, *(choices[index].ffn for choices in found)}
        assert [v for v in FFN if v in layer.ffn] == list(layer.ffn), "in the order of the whole space"
    assert space.size < SPACE.size and not any(layer.coupled for layer in space.layers)


def test_the_optimum_of_the_whole_space_is_the_narrowed_ones_too(architecture_file):
    space = library_space(SPACE, settings(architecture_file, mode="coupled"))
    assert all(layer.coupled for layer in space.layers)
    scored = {(item.layer, item.choice) for item in all_replacements(space, "block")}
    own = Scores(tuple(row for row in SCORES.rows if (row.layer, LayerChoice(row.attention, row.ffn)) in scored), "block")
    assert len(own.rows) < len(SCORES.rows)
    whole = found_within()
    again = found_within(space=space, scores=own)
    assert (again.choices, again.objective, again.status) == (whole.choices, whole.objective, "optimal")


def test_without_a_source_the_space_is_the_whole_one():
    assert library_space(SPACE, LibraryConfig()) is SPACE


def test_coupled_spaces_are_keyed_apart_and_travel_as_json(architecture_file):
    decoupled, coupled = (library_space(SPACE, settings(architecture_file, mode=m)) for m in ("decoupled", "coupled"))
    assert to_json(decoupled) != to_json(coupled) != to_json(SPACE)
    assert SearchSpace.from_json(to_json(coupled)) == coupled and SearchSpace.from_json(to_json(decoupled)) == decoupled


def test_a_coupled_space_holds_pairs_and_a_decoupled_one_halves():
    layer = LayerSpace((PARENT, "gqa:2", "noop"), (PARENT, "ffn:64"))
    assert [layer.entry(choice) for choice in layer.trained] == [("attention", "gqa:2"), ("attention", "noop"), ("ffn", "ffn:64")]
    pairs = replace(layer, coupled=True)
    assert len(pairs.trained) == 5 and {pairs.entry(choice)[0] for choice in pairs.trained} == {"block"}
    assert ("block", "gqa:2 + ffn:64") in [pairs.entry(choice) for choice in pairs.trained]


def test_coupled_pairs_are_never_scored_by_halves():
    space = SearchSpace((LayerSpace((PARENT, "noop"), (PARENT, "ffn:64"), coupled=True),))
    assert len(all_replacements(space, "block")) == 3
    with pytest.raises(ConfigError, match="write scoring.granularity: block"):
        all_replacements(space, "subblock")
    with pytest.raises(ConfigError, match="write scoring.shortlist: none"):
        fisher._LayerHalves.of(None, 0, space.layers[0], None)


def test_too_many_pairs_are_refused_with_the_ways_out(sweep):
    with pytest.raises(
        ConfigError, match=r"library.narrow_from: \d pairs are left in layer \d, and coupled training takes 1; .*max_pairs"
    ):
        library_space(SPACE, settings(sweep.url, mode="coupled", max_pairs=1))
    assert library_space(SPACE, settings(sweep.url, max_pairs=1)).size > 1, "decoupled has no pairs"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "holds no architectures .KeyError: 'choices'"),
        ("not json", "holds no architectures"),
        ('[{"architecture": null}]', "no budget of .* could be met"),
        (json.dumps({"choices": [{"attention": "noop", "ffn": "parent"}]}), "architecture of 1 layers, and the parent has 4"),
        (json.dumps({"choices": [{"attention": "gqa:3", "ffn": "parent"}] * 4}), "'gqa:3' there, .*; add it to space.attention"),
        (json.dumps({"choices": [{"attention": "parent", "ffn": "parent"}] * 4}), "its architectures replace nothing"),
    ],
)
@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_what_is_no_architecture_of_this_space_is_named(tmp_path, content, words, mode):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        library_space(SPACE, settings(path, mode=mode))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "cannot be read"),
        (lambda path: path.mkdir(), "neither architecture.json nor sweep.json is in"),
        (lambda path: path.write_bytes(b"PAR1"), "holds no architectures"),
        (lambda path: pq.write_table(pa.table({"choices": [1]}), path), "holds no architectures"),
    ],
)
def test_a_source_that_is_missing_empty_or_broken_is_named(tmp_path, make, words):
    path = tmp_path / "broken.parquet"
    make(path)
    with pytest.raises(ConfigError, match=f"library.narrow_from: .*{words}"):
        read_architectures(str(path))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("library.mode=coupled",), "set narrow_from to an architecture.json or a sweep"),
        (("library.mode=coupled", "library.narrow_from=x"), "granularity subblock .*; set scoring.granularity to block"),
        (
            ("library.mode=coupled", "library.narrow_from=x", "scoring.granularity=block", "scoring.shortlist=fisher"),
            "scoring.shortlist fisher .*; set scoring.shortlist to none",
        ),
    ],
)
def test_settings_that_coupled_pairs_do_not_allow(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load(None, None, overrides)


@pytest.fixture(scope="module")
def parent_with_text(tmp_path_factory):
    return save_parent_with_text(tmp_path_factory.mktemp("parent"))


def test_a_run_trains_scores_and_searches_what_is_left_and_keys_it(parent_with_text, tmp_path):
    choices = [LayerChoice("gqa:1", "noop"), LayerChoice("noop", PARENT), LayerChoice()]
    source = tmp_path / "architecture.json"
    source.write_text(json.dumps({"choices": [vars(choice) for choice in choices]}))
    narrow, coupled = (f"library.narrow_from={source}",), ("library.mode=coupled", "scoring.granularity=block")
    runs = [make_run(parent_with_text, tmp_path, *extra) for extra in ((), narrow, narrow + coupled)]
    for run in runs:
        run.check()
    whole, decoupled, pairs = (run.space for run in runs)
    assert [(layer.attention, layer.ffn) for layer in decoupled.layers] == [
        ((PARENT, "gqa:1"), (PARENT, "noop")),
        ((PARENT, "noop"), (PARENT,)),
        ((PARENT,), (PARENT,)),
    ]
    assert [len(layer.trained) for layer in whole.layers] == [4] * 3
    assert [len(layer.trained) for layer in pairs.layers] == [3, 1, 0]
    assert len({run.space for run in runs}) == 3


def test_a_narrowed_run_that_cannot_work_is_refused_before_it_starts(parent_with_text, tmp_path):
    with pytest.raises(ConfigError, match="library.narrow_from: .* cannot be read"):
        make_run(parent_with_text, tmp_path, f"library.narrow_from={tmp_path / 'nowhere.json'}").check()
    source = tmp_path / "architecture.json"
    source.write_text(json.dumps({"choices": [vars(LayerChoice("gqa:1"))] * 3}))
    fixed = "search.limits={speedup: 1.1, fixed: {0: {attention: noop}}}"
    run = make_run(parent_with_text, tmp_path, f"library.narrow_from={source}", fixed)
    with pytest.raises(ConfigError, match="layer 0 has no variant 'noop'"):
        check(run.config, run.store)


NOW = LayerChoice("gqa:2", PARENT)  # of the first layer of a child, in the tests below


def later_round(store, choices, now, number=2, space=None):
    """The artifacts of a search of a later round, as earlier versions left them: the architecture alone does not say `now`."""
    layers = (replace(layer, now=own) for layer, own in zip(SPACE.layers, now, strict=True))
    space = space or to_json(SearchSpace(tuple(layers))).decode()
    library = store.artifact("library", {}, {"space": space})
    library.finish({})
    scores = store.artifact("scores", {}, {"library": library.key})
    scores.finish({})
    searched = store.artifact("architecture", {"round": [number, 2]}, {"scores": scores.key})
    written = asdict(replace(found_within(), choices=choices))
    del written["now"]
    searched.write_json("architecture.json", written)
    searched.finish({})
    return library, searched


def test_an_architecture_of_a_later_round_is_counted_from_the_original(tmp_path):
    nothing = (LayerChoice(),) * len(SPACE.layers)
    own = (LayerChoice(PARENT, "ffn:64"), *nothing[1:])
    now = (NOW, *nothing[1:])
    store = Store(str(tmp_path / "store"))
    library, searched = later_round(store, own, now)
    assert read_architectures(searched.url) == [(LayerChoice("gqa:2", "ffn:64"), *nothing[1:])]
    assert library_space(SPACE, settings(searched.url)).layers[0].attention == (PARENT, "gqa:2")
    file = tmp_path / "copied.json"
    file.write_bytes(to_json(replace(found_within(), choices=own, now=now)))
    assert read_architectures(str(file)) == [(LayerChoice("gqa:2", "ffn:64"), *nothing[1:])]
    shutil.rmtree(library.url)
    with pytest.raises(ConfigError, match="is of round 2 of 2, and its library, .*, is not in its store; name it in the store"):
        read_architectures(searched.url)
    _, first = later_round(Store(str(tmp_path / "other")), own, nothing, number=1)
    assert read_architectures(first.url) == [own]


def test_a_library_of_a_version_that_knew_no_rounds_says_nothing_of_what_its_parent_was(tmp_path):
    """The record of one such was `cannot be read (KeyError: 'now')`, and with it an architecture that had been read before."""
    raw = json.loads(to_json(SPACE))
    for layer in raw["layers"]:
        del layer["now"]
    assert SearchSpace.from_json(json.dumps(raw).encode()) == SPACE
    own = (LayerChoice(PARENT, "ffn:64"),) * len(SPACE.layers)
    _, searched = later_round(Store(str(tmp_path)), own, (LayerChoice(),) * len(SPACE.layers), 1, json.dumps(raw))
    assert read_architectures(searched.url) == [own]


def test_a_sweep_of_a_childs_run_is_counted_from_the_original(tmp_path):
    """Its JSON says what the child was already; its table is followed to the library."""
    space = SearchSpace(tuple(onward(layer, NOW) for layer in SPACE.layers))
    store = Store(str(tmp_path))
    library = store.artifact("library", {}, {"space": to_json(space).decode()})
    library.finish({})
    scores = store.artifact("scores", {}, {"library": library.key})
    scores.finish({})
    swept = store.artifact("sweep", {}, {"scores": scores.key})
    grid = Grid({(30, 11): SearchSetup(space, SCORES, PROFILE, SCENARIO, "kl", "mip", 60.0, HARD)})
    (point,) = grid_points({"speedup": [1.01]})
    swept.write_json(point_name(point), grid.solve(point))
    finish_sweep(solved_points([point], swept), swept)
    own = found_within(Limits(speedup=1.01), space=space).choices
    for name in ("", "/sweep.json", "/sweep.parquet"):
        assert read_architectures(swept.url + name) == [tuple(choice.on(NOW) for choice in own)]
    shutil.copy(f"{swept.url}/sweep.json", tmp_path / "copied.json")
    assert read_architectures(str(tmp_path / "copied.json")) == [tuple(choice.on(NOW) for choice in own)]
    shutil.rmtree(library.url)  # the table then is counted by what the JSON beside it says
    assert read_architectures(f"{swept.url}/sweep.parquet") == [tuple(choice.on(NOW) for choice in own)]


def test_what_a_child_is_already_is_its_own_when_its_space_is_narrowed():
    space = SearchSpace(tuple(onward(layer, NOW) for layer in SPACE.layers))
    same, more = ((choice,) * len(space.layers) for choice in (LayerChoice("gqa:2", "ffn:64"), LayerChoice("gqa:4", PARENT)))
    assert {(layer.attention, layer.ffn) for layer in narrowed(space, [same]).layers} == {((PARENT,), (PARENT, "ffn:64"))}
    with pytest.raises(ConfigError, match="layer 0 has 'gqa:4' there, and this parent, a child itself, has 'gqa:2', .* cannot"):
        narrowed(space, [more])


def test_a_child_that_is_all_that_was_found_already_is_said_to_be_that(tmp_path):
    """It said that the architecture replaces nothing, as it does of this parent, and not of the original."""
    file = tmp_path / "architecture.json"
    file.write_bytes(to_json(replace(found_within(), choices=(NOW,) * len(SPACE.layers))))
    assert library_space(SPACE, settings(str(file))).layers[0].attention == (PARENT, "gqa:2")
    space = SearchSpace(tuple(onward(layer, NOW) for layer in SPACE.layers))
    with pytest.raises(ConfigError, match="a child itself, is already all that its architectures have; name one"):
        library_space(space, settings(str(file)))


def test_a_search_says_what_its_parent_was_already():
    space = SearchSpace(tuple(onward(layer, NOW) for layer in SPACE.layers))
    found = found_within(Limits(params=10**9), space=space)
    assert found.now == (NOW,) * len(space.layers) and found_within().now == ()
    assert Architecture.from_json(to_json(found)) == found
