"""What the model of a child has besides its parent's class: layers of its own shapes.

It is part of the code in a child's folder, see `puzzle_ray.models.folder_code`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.models.child_settings import words_of_layers
from puzzle_ray.surgery.kv_cache import cache_among
from puzzle_ray.surgery.shapes import reshape_by_words, with_begun_weights
from puzzle_ray.surgery.subblocks import part_joined_tokens
from puzzle_ray.surgery.window import prepare_windows


class ChildLayers:
    """Gives the layers of a model the shapes that its config says. It stands before the parent's class among a class's bases.

    The model is built from the settings of the whole first.
    """

    descriptor: Descriptor
    _keys_to_ignore_on_load_unexpected = None  # a child's files hold nothing else; vLLM would drop GPT-2's `c_attn.bias` by it

    def __init__(self, config: Any, *args: Any, **settings: Any) -> None:
        super().__init__(config, *args, **settings)  # type: ignore[call-arg]
        first, _, rest = self.descriptor.layers.partition(".")
        path = self.descriptor.layers if hasattr(self, first) else rest  # without a head, names are shorter
        layers = self.get_submodule(path)  # type: ignore[attr-defined]
        with_begun_weights(self, layers, lambda: self.reshape(layers, config))
        for layer in layers:
            part_joined_tokens(layer, self.descriptor)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **settings: Any
    ) -> None:
        """Transformers' own, and the cache has layers for windows from the beginning."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **settings)  # type: ignore[misc]
        cache = cache_among(model_kwargs)
        if isinstance(getattr(cache, "layers", None), list):
            records = bool(getattr(generation_config, "is_assistant", False))
            prepare_windows(cache, self.modules(), records)  # type: ignore[attr-defined]

    def reshape(self, layers: nn.ModuleList, config: Any) -> None:
        for layer, words in zip(layers, words_of_layers(config), strict=True):
            reshape_by_words(layer, words, self.descriptor, config)
