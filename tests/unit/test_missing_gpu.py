"""A store whose GKD was done on a GPU, taken up where there is none: only a distillation that is still to be done asks for one."""

from dataclasses import replace

import pytest
import torch
from small_runs import SMALL, save_parent_with_text

from puzzle_ray import pipeline
from puzzle_ray.errors import ConfigError
from puzzle_ray.progress import Quiet
from puzzle_ray.store import StillToDo, Store, do_once, only_looking


def test_what_is_finished_needs_no_gpu(tmp_path, monkeypatch):
    parent, text = save_parent_with_text(tmp_path / "parent")
    given = {"parent": str(parent), "data.train": str(text), "gkd": SMALL["gkd"] | {"use_gpu": True}}
    there, distill = [True], pipeline.distill_child
    monkeypatch.setattr("puzzle_ray.pipeline.torch.cuda.is_available", lambda: there[0])

    def by_cpu(job, progress):
        distill(replace(job, config=job.config.model_copy(update={"use_gpu": False})), progress)

    def compress():
        return pipeline.compress(settings=SMALL | given, store=tmp_path / "store", progress=Quiet())

    monkeypatch.setattr(pipeline, "distill_child", by_cpu)
    torch.set_num_threads(1)
    first = compress()
    there[0] = False
    assert compress().child == first.child
    store = Store(str(tmp_path / "store"))
    for stage in ("evaluation", "quality"):
        remove(store, stage)
        assert compress().child == first.child, stage
    for stage in ("gkd", "profile"):
        remove(store, stage)
        with pytest.raises(ConfigError, match="gkd.use_gpu: a GPU is asked for, but PyTorch sees none here"):
            compress()
        assert not [name for name in store.names(store.root) if name.startswith(f"{stage}-")], "it is refused before work"


def remove(store, stage):
    (name,) = [name for name in store.names(store.root) if name.startswith(f"{stage}-")]
    store.filesystem.rm(f"{store.root}/{name}", recursive=True)


def test_a_look_does_nothing(tmp_path):
    artifact, did = Store(str(tmp_path)).artifact("tokens", {}, {}), []
    with pytest.raises(StillToDo, match="tokens-.* is still to be done"), only_looking():
        do_once(artifact, did.append)
    assert not did and not list(tmp_path.iterdir())
    assert do_once(artifact, lambda a: a.finish({}))
    with only_looking():
        assert not do_once(artifact, did.append)
