"""The config class that travels with a `nemotron-nas` (DeciLM) checkpoint: engines read `block_configs` as objects, JSON has dicts.

Copied beside `config.json` as it is, so it imports nothing but transformers.
"""

from types import SimpleNamespace
from typing import Any

from transformers import PretrainedConfig


class NemotronNasConfig(PretrainedConfig):
    """`block_configs`: per layer an object with `attention` (`n_heads_in_group`, `no_op`, `replace_with_linear`) and `ffn` (`ffn_mult`,
    `no_op`, `replace_with_linear`). Everything else is Llama's."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = None, **kwargs: Any) -> None:
        self.block_configs = [
            block
            if isinstance(block, SimpleNamespace)
            else SimpleNamespace(**{k: SimpleNamespace(**v) for k, v in block.items()})
            for block in block_configs or ()
        ]
        if hasattr(PretrainedConfig, "rope_scaling"):  # transformers 5: another name for rope_parameters, which are here, too
            kwargs.pop("rope_scaling", None)
        for name in ("max_position_embeddings", "rope_parameters"):  # looked at while the base initialises
            setattr(self, name, kwargs.pop(name, None))
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        blocks, self.block_configs = self.block_configs, []
        try:
            found = super().to_dict()
        finally:
            self.block_configs = blocks
        found["block_configs"] = [{name: dict(vars(half)) for name, half in vars(block).items()} for block in blocks]
        return found
