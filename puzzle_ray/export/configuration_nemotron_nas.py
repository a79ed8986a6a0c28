"""The config class of a `nemotron-nas` (DeciLM) checkpoint. Engines read `block_configs` as objects, while JSON has dicts.

This file is copied beside `config.json`, so it imports nothing but transformers.
"""

from types import SimpleNamespace
from typing import Any

from transformers import PretrainedConfig

DEFAULTS = {  # of what Llama's model reads
    "pad_token_id": None,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "initializer_range": 0.02,
    "use_cache": True,
}


class NemotronNasConfig(PretrainedConfig):
    """Llama's settings, and `block_configs`.

    A layer's entry is an object with `attention` (`n_heads_in_group`, `no_op`, `replace_with_linear`) and `ffn` (`ffn_mult`, `no_op`,
    `replace_with_linear`).
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = None, **kwargs: Any) -> None:
        self.block_configs = [
            block
            if isinstance(block, SimpleNamespace)
            else SimpleNamespace(**{k: SimpleNamespace(**v) for k, v in block.items()})
            for block in block_configs or ()
        ]
        for name, value in DEFAULTS.items():
            kwargs.setdefault(name, value)
        if hasattr(PretrainedConfig, "rope_scaling"):  # another name of rope_parameters in transformers 5
            kwargs.pop("rope_scaling", None)
        for name in ("max_position_embeddings", "rope_parameters"):  # the base class reads them while it initialises
            setattr(self, name, kwargs.pop(name, None))
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        blocks, self.block_configs = self.block_configs, []
        try:
            settings = super().to_dict()
        finally:
            self.block_configs = blocks
        settings["block_configs"] = [{name: dict(vars(half)) for name, half in vars(block).items()} for block in blocks]
        return settings
