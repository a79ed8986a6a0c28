"""What the config of a child has besides its parent's settings. It imports nothing of this package: it is part of the code in a child's
folder, see `puzzle_ray.models.folder_code`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

# transformers from 5.15 knows per_layer_config; this is the class that has it
_Heterogeneous: Any = next((base for base in PretrainedConfig.__mro__ if "is_heterogeneous" in vars(base)), None)
HETEROGENEOUS = _Heterogeneous is not None
OURS = {
    "linear": (),
    "window": None,
}  # words of a layer that transformers lacks; every layer's must be a setting of the whole, too


def version_4_rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of transformers 5 (`rope_parameters`), once more in the words of transformers 4."""
    parameters = settings.get("rope_parameters")
    if not isinstance(parameters, Mapping) or not parameters:
        return {}
    words = {}
    if "sliding_attention" in parameters:  # by type of layer
        words["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    kind = parameters.get("rope_type", "default")
    scaling = {k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if kind == "longrope":  # Phi-3 takes these and no others
        scaling = {"type": kind, "short_factor": parameters["short_factor"], "long_factor": parameters["long_factor"]}
    words |= {"rope_theta": parameters["rope_theta"], "rope_scaling": None if kind == "default" else scaling}
    return words | {k: v for k, v in parameters.items() if k == "partial_rotary_factor"}


class ChildSettings:
    """The parent's config with a shape for every layer. It stands before the parent's config class among a class's bases.

    `per_layer_config` has the words of `puzzle_ray.surgery.shapes` for each layer that differs from the rest of the config;
    `puzzle_layers` has the names of the variants that the layers were made of.
    """

    def __init__(self, puzzle_layers: Any = None, per_layer_config: Any = None, **settings: Any) -> None:
        for word, value in OURS.items():
            settings.setdefault(word, list(value) if isinstance(value, tuple) else value)
        if hasattr(type(self), "rope_parameters") and settings.get("rope_parameters"):
            for name in version_4_rope(settings):
                settings.pop(name, None)
        if HETEROGENEOUS and per_layer_config is not None:
            settings["per_layer_config"] = per_layer_config
        super().__init__(**settings)
        self.puzzle_layers = [dict(layer) for layer in puzzle_layers or ()]
        if not HETEROGENEOUS and per_layer_config is not None:
            self.per_layer_config = per_layer_config

    if HETEROGENEOUS:

        def __getattribute__(self, name: str) -> Any:
            """Every layer is built from the settings of the whole first, so these can be read; transformers 5 would refuse.

            `super` in place of `object`: torch.compile, and so vLLM, can read on in this form alone.
            """
            if name != "attribute_map":
                name = super(_Heterogeneous, self).__getattribute__("attribute_map").get(name, name)
            return super(_Heterogeneous, self).__getattribute__(name)

    def to_dict(self) -> dict[str, Any]:
        settings: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return settings | version_4_rope(settings)


def words_of_layers(config: Any) -> list[dict[str, Any]]:
    """The words of every layer: what differs from the settings of the whole model."""
    count = config.num_hidden_layers
    stored = config.per_layer_config if HETEROGENEOUS else getattr(config, "per_layer_config", None) or {}
    if isinstance(stored, Mapping):
        by_index = {int(index): dict(words) for index, words in stored.items()}
        return [by_index.get(index, {}) for index in range(count)]
    if not config.is_heterogeneous:
        return [{} for _ in range(count)]
    names = [*config.per_layer_attributes]
    layers = [stored[index] for index in range(count)]
    return [
        ({"skip": list(layer.skip)} if layer.skip else {})
        | {name: getattr(layer, name) for name in names if getattr(layer, name) != getattr(config, name)}
        for layer in layers
    ]
