"""The pool of workers: whoever dies is known from who is busy, and what is lost is done again, but not for ever."""

import os
import signal
import time

import pytest
import ray
from waiting import until

from actors.pool import Pool, Terms
from puzzle_ray.errors import ClusterError

TERMS = Terms("test", "workers", placement_timeout_s=240, step_timeout_s=240)


@ray.remote(num_cpus=0, max_restarts=0)
class Actor:
    def __init__(self, fails=False):
        if fails:
            raise ValueError("no such model")

    def node(self):
        return ray.get_runtime_context().get_node_id()

    def work(self, item, deadly=False, rest_s=0.0):
        time.sleep(rest_s)
        if deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item

    def pid(self):
        return os.getpid()


def pool_of(count, terms=TERMS, make=lambda: Actor.remote(), **options):
    def start():
        actor = make()
        return actor, [actor]

    pool = Pool(start, terms, **options)
    pool.start(count)
    return pool


def squares(pool, items, send=lambda actor, item: actor.work.remote(item), then=lambda item, found: None, **options):
    found = {}

    def receive(item, result):
        found[item] = result
        return bool(then(item, found))

    pool.run(items, send, receive, name_of=lambda item: f"item {item}", **options)
    return found


def gone(actor):
    """Killed, and known to be: Ray returns before the process is dead."""
    ray.kill(actor, no_restart=True)
    until(lambda: not answers(actor), "the actor is dead")


def answers(actor):
    try:
        return bool(ray.get(actor.node.remote(), timeout=240))
    except ray.exceptions.RayActorError:
        return False


def test_all_items_are_done_by_whoever_is_free_and_the_pool_can_be_used_again(local_ray):
    with pool_of(2, depth=2) as pool:
        assert squares(pool, range(7)) == {n: n * n for n in range(7)}
        assert squares(pool, [9]) == {9: 81} and len(pool.workers) == 2
    assert pool.workers == []


def test_an_item_is_sent_again_as_long_as_it_wants_to_be(local_ray):
    turns = []

    def then(item, _):
        turns.append(item)
        return turns.count(item) < item

    with pool_of(1) as pool:
        squares(pool, [1, 3], then=then)
    assert turns == [1, 3, 3, 3]


def test_workers_that_die_at_rest_count_against_no_item(local_ray, monkeypatch):
    """Where one death at an item would be too many."""
    monkeypatch.setattr("actors.pool.MAX_DEATHS", 1)
    with pool_of(1) as pool:
        assert squares(pool, [3]) == {3: 9}
        gone(pool.workers[0].handle)
        assert squares(pool, [5]) == {5: 25}


def test_of_five_workers_four_that_die_at_once_leave_the_fifth_to_its_work(local_ray):
    """There is no room for others in their place, and nobody waits for it."""
    started, killed = [], []

    def make():
        started.append(Actor.options(num_cpus=0 if len(started) < 5 else 1000).remote())
        return started[-1]

    with pool_of(5, make=make) as pool:

        def send(actor, item):
            if len(pool.running) == 4 and not killed:  # the fifth gets its first item
                killed.extend(worker.handle for worker in pool.ready if worker.handle is not actor)
                for other in killed:
                    gone(other)
            return actor.work.remote(item, rest_s=0.0 if killed else 60.0)

        ray.get([actor.node.remote() for actor in started], timeout=240)  # all five are there
        assert squares(pool, range(10), send) == {n: n * n for n in range(10)}
        assert len(killed) == 4 and len(started) == 9 and len(pool.ready) == 1


@pytest.mark.parametrize(("deaths", "passes"), [(1, True), (2, False)])
def test_an_item_at_which_workers_die_too_often_without_a_success_between_is_an_error(local_ray, monkeypatch, deaths, passes):
    monkeypatch.setattr("actors.pool.MAX_DEATHS", 2)
    sent = []

    def send(actor, item):
        sent.append(item)
        return actor.work.remote(item, deadly=len(sent) <= deaths)

    with pool_of(1) as pool:
        if passes:
            assert squares(pool, [3], send) == {3: 9}
        else:
            with pytest.raises(ClusterError, match="test: item 3: the process that did it died again and again .*memory"):
                squares(pool, [3], send)
    assert len(sent) == 2


def test_deaths_between_successes_are_forgotten(local_ray, monkeypatch):
    monkeypatch.setattr("actors.pool.MAX_DEATHS", 2)
    sent = []

    def send(actor, item):
        sent.append(item)
        return actor.work.remote(item, deadly=len(sent) % 2 == 1)  # every other time

    with pool_of(1) as pool:
        squares(pool, [2], send, then=lambda *_: len(sent) < 4)
    assert len(sent) == 4


def test_a_worker_that_cannot_start_is_an_error_at_once_and_none_where_another_works(local_ray, capsys):
    with pool_of(1, make=lambda: Actor.remote(fails=True)) as pool, pytest.raises(ClusterError, match="workers could not start"):
        squares(pool, [1])
    started = []

    def make():
        started.append(Actor.remote(fails=bool(started)))
        return started[-1]

    with pool_of(2, make=make) as pool:
        until(lambda: not answers(started[1]), "the second one has failed")
        assert squares(pool, range(3), lambda actor, item: actor.work.remote(item, rest_s=0.5)) == {0: 0, 1: 1, 2: 4}
    assert "no such model" in capsys.readouterr().err


def test_waiting_has_an_end(local_ray):
    slow = Terms("test", "workers", placement_timeout_s=240, step_timeout_s=1)
    with (
        pool_of(1, slow) as pool,
        pytest.raises(ClusterError, match="item 1: nothing was done within 1 s; raise cluster.step_timeout_s"),
    ):
        squares(pool, [1], lambda actor, item: actor.work.remote(item, rest_s=60))
    nowhere = Terms("test", "workers", placement_timeout_s=1, step_timeout_s=60)
    with (
        pool_of(2, nowhere, make=lambda: Actor.options(num_cpus=1000).remote()) as pool,
        pytest.raises(ClusterError, match=r"2 workers did not start within 1 s; the cluster has \{CPU: 4\}"),
    ):
        squares(pool, [1])


def test_news_from_a_worker_extend_its_time(local_ray):
    slow = Terms("test", "workers", placement_timeout_s=240, step_timeout_s=1.5)
    with pool_of(1, slow) as pool:
        found = squares(pool, [2], lambda actor, item: actor.work.remote(item, rest_s=4), news=lambda actor, item: True)
    assert found == {2: 4}
