"""vLLM's plug-in: where puzzle_ray is installed, vLLM loads children without `trust_remote_code`.

vLLM calls `register` in each of its processes, by the entry point of the group `vllm.general_plugins`.
"""

from __future__ import annotations

import importlib

_BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Makes children known to transformers, and their architectures to vLLM, which runs them by its Transformers backend."""
    from transformers import AutoConfig

    from puzzle_ray.export.configuration_nemotron_nas import NemotronNasConfig
    from puzzle_ray.families.registry import families
    from puzzle_ray.models.child_classes import child_classes, register_children

    register_children()
    AutoConfig.register(NemotronNasConfig.model_type, NemotronNasConfig, exist_ok=True)
    registry = importlib.import_module("vllm").ModelRegistry
    for model_type in families():
        _, model_class = child_classes(model_type)
        registry.register_model(model_class.__name__, _BACKEND)
