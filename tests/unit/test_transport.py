"""What goes through a transport comes out the same bits, in the dtype that travels."""

import pytest
import torch

from actors.transport import TRANSPORTS, find_transport
from jobs.checks import check
from puzzle_ray.config import load
from puzzle_ray.errors import ConfigError
from puzzle_ray.store import Store


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_tensor_arrives_as_it_was_sent(name, dtype):
    transport = find_transport(name)
    tensor = torch.randn(2, 3, 4).transpose(0, 1)  # not contiguous
    packed = transport.pack(tensor, dtype)
    arrived = transport.unpack(packed, dtype)
    assert arrived.dtype == dtype and torch.equal(arrived, tensor.to(dtype)) and packed.nbytes == 24 * dtype.itemsize


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_that_come_one_after_the_other_arrive_alike(name, dtype):
    transport, tensors = find_transport(name), [torch.randn(n, 4, 3).transpose(1, 2) for n in (2, 3)]
    for _ in range(2):
        arrived = [transport.unpack(packed, dtype) for packed in transport.pack_all(iter(tensors), dtype)]
        assert all(torch.equal(a, t.to(dtype)) for a, t in zip(arrived, tensors, strict=True))


def test_an_unknown_transport_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match="cluster.transport: unknown transport 'objectstore'; did you mean 'object_store'?"):
        find_transport("objectstore")


def test_it_is_refused_before_any_work(tmp_path):
    config = load("tiny", None, (f"store={tmp_path}", "cluster.transport=nixl"))
    with pytest.raises(ConfigError, match="unknown transport 'nixl'; known: object_store"):
        check(config, Store(str(tmp_path)))
