"""Children served by vLLM or TensorRT-LLM in place of this package's engine. Each is imported when it is chosen."""

from typing import Any

from ray import serve
from ray.serve import Application

from puzzle_ray.errors import ConfigError
from puzzle_ray.serving.settings import ServeSettings


def build_vllm(settings: ServeSettings, options: dict[str, Any]) -> Application:
    """vLLM behind ray.serve.llm, which brings OpenAI's routes. `engine_options` are vLLM's engine arguments. Raises ConfigError."""
    try:
        from ray.serve.llm import LLMConfig, build_openai_app
    except ImportError as error:
        raise _missing("vllm", 'pip install "ray[llm]"', error) from None
    ((name, folder),) = settings.models.items()
    arguments: dict[str, Any] = {"dtype": settings.dtype, "max_num_seqs": settings.max_batch_size}
    if settings.max_length:
        arguments["max_model_len"] = settings.max_length
    config = LLMConfig(
        model_loading_config={"model_id": name, "model_source": folder},
        deployment_config=options,
        engine_kwargs=arguments | settings.engine_options,
    )
    return build_openai_app({"llm_configs": [config]})


@serve.deployment(name="TensorRTLLMServer", max_constructor_retry_count=1)
class TensorRTLLMServer:
    """A plain deployment around TensorRT-LLM's LLM API: POST {"prompt": text, "max_tokens": n, "temperature": t}, whole answers."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from tensorrt_llm import LLM

        asked = ServeSettings.model_validate(settings)
        ((self._name, folder),) = asked.models.items()
        self._llm = LLM(model=folder, dtype=asked.dtype, max_batch_size=asked.max_batch_size, **asked.engine_options)

    async def __call__(self, request: Any) -> dict[str, Any]:
        from tensorrt_llm import SamplingParams

        body = await request.json()
        params = SamplingParams(max_tokens=int(body.get("max_tokens", 16)), temperature=float(body.get("temperature", 1.0)))
        output = await self._llm.generate_async(body["prompt"], params)
        choice = {"index": 0, "text": output.outputs[0].text, "finish_reason": output.outputs[0].finish_reason}
        return {"object": "text_completion", "model": self._name, "choices": [choice]}


def build_tensorrt_llm(settings: ServeSettings, options: dict[str, Any]) -> Application:
    """TensorRT-LLM in a deployment of its own. `engine_options` are those of its LLM class. Raises ConfigError."""
    from importlib.util import find_spec

    if find_spec("tensorrt_llm") is None:
        raise _missing("tensorrt_llm", 'pip install "puzzle_ray[tensorrt]"', None)
    return TensorRTLLMServer.options(**options).bind(settings.model_dump(mode="json"))  # type: ignore[attr-defined]


def _missing(engine: str, remedy: str, error: Exception | None) -> ConfigError:
    reason = f" ({error})" if error else ""
    return ConfigError("engine", f"is {engine}, which is not installed here{reason}", f"{remedy}, or take engine: puzzle")
