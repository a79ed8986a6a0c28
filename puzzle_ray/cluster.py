"""Settings of the cluster. Only `actors` and `jobs` read them: the library itself runs in one process."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from puzzle_ray.settings import Count, GpuShare, Name, Positive, Section


class ClusterConfig(Section):
    """Ray. `address`: `local` starts a cluster on this machine; `auto` or host:port joins one. RAY_ADDRESS wins over `local`."""

    address: Name = "local"
    connect_timeout_s: Positive = 30.0
    placement_timeout_s: Positive = 300.0
    num_shards: Count = 2
    blocks_per_trainer: Count | Literal["auto"] = "auto"
    trainers_per_layer: Count = 1  # at the most; more than one split the layer's variants among them
    colocate: bool = False  # trainers in their shard's process; then blocks_per_trainer is not read
    cpus_per_trainer: Count = 1
    gpus_per_trainer: GpuShare = 0
    gpus_per_shard: GpuShare = 0
    step_timeout_s: Positive = 600.0  # one micro-batch of any worker
    max_recoveries: Count = 20
    autoscaling: bool = False  # nodes are added on demand: what none has yet is waited for, up to placement_timeout_s
    transport: str = "object_store"  # of hidden states

    @model_validator(mode="after")
    def _one_process_on_one_gpu(self) -> ClusterConfig:
        both = self.gpus_per_shard + self.gpus_per_trainer
        if self.colocate and both > 1 and both != int(both):
            problem = f"gpus_per_shard and gpus_per_trainer are {both:g} together, and with colocate one process asks for both"
            raise ValueError(f"{problem}; give it at most 1")
        return self

    @model_validator(mode="after")
    def _layers_or_parts_of_them(self) -> ClusterConfig:
        if self.trainers_per_layer > 1 and self.colocate:
            problem = f"trainers_per_layer={self.trainers_per_layer} splits a layer, and with colocate its shard trains all of it"
            raise ValueError(f"{problem}; leave out one of them, or raise num_shards")
        if self.trainers_per_layer > 1 and self.blocks_per_trainer not in ("auto", 1):
            problem = f"trainers_per_layer={self.trainers_per_layer} splits layers"
            problem += f", and blocks_per_trainer={self.blocks_per_trainer} joins them"
            raise ValueError(f"{problem}; leave blocks_per_trainer at auto or 1")
        return self

    def library_identity(self) -> dict[str, Any]:
        """The settings that the bits of a library depend on. A product's sums are split by threads, and a GPU sums in another order.

        How many cores or GPUs there are is no setting, and is in no key.
        """
        on_gpu = self.gpus_per_trainer > 0
        threads = {} if on_gpu else {"cpus_per_trainer": self.cpus_per_trainer}
        return threads | {"trainers_on_gpu": on_gpu} | self.shards_identity()

    def shards_identity(self) -> dict[str, Any]:
        """The settings that the bits of what the parent computes depend on. On CPUs every shard computes with one thread."""
        return {"shards_on_gpu": self.gpus_per_shard > 0}

    def in_one_process(self) -> ClusterConfig:
        """As the library without Ray computes: on the CPU, whatever GPUs are given to actors."""
        return self.model_copy(update={"gpus_per_trainer": 0, "gpus_per_shard": 0})
