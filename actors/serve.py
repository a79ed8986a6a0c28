"""The Serve application of children behind OpenAI's API, for `puzzle-ray serve-child`, `serve run`, `serve deploy` and KubeRay.

    serve run actors.serve:build child=runs/child

    applications:                          # a file for `serve deploy`, or serveConfigV2 of a RayService
      - name: child
        route_prefix: /
        import_path: actors.serve:build
        args: {models: {child: s3://bucket/child, parent: org/parent}, autoscaling: {min_replicas: 1, max_replicas: 4}}

The settings are the fields of `puzzle_ray.serving.settings.ServeSettings`.
"""
# Serve reads the annotation of `args` itself, so annotations must not be strings here.

from typing import Any

from ray import serve
from ray.serve import Application

from actors.direct_http import KEEP_ALIVE_S, Where
from puzzle_ray.serving.settings import ServeSettings


def build(args: ServeSettings) -> Application:
    """The application that the settings describe. Raises ConfigError where its engine is not installed."""
    return application(args)


def application(args: ServeSettings, where: Where | None = None) -> Application:
    """As `build` makes it; with `where`, its replica listens there itself (see `direct_http.listens_itself`)."""
    options = deployment_options(args)
    if args.engine == "vllm":
        from actors.other_engines import build_vllm

        return build_vllm(args, options)
    if args.engine == "tensorrt_llm":
        from actors.other_engines import build_tensorrt_llm

        return build_tensorrt_llm(args, options)
    from actors.child_server import ChildServer

    return ChildServer.options(**options).bind(args.model_dump(mode="json"), where)  # type: ignore[attr-defined]


def start_serve(host: str, port: int, proxied: bool) -> None:
    """Serve on the cluster that this process is connected to, if it is not there yet. Its proxy listens, or nothing of its own does."""
    http = {"host": host, "port": port, "keep_alive_timeout_s": KEEP_ALIVE_S}
    location = "EveryNode" if proxied else "Disabled"
    serve.start(proxy_location=location, http_options=http, logging_config={"log_level": "WARNING"})


def deployment_options(settings: ServeSettings) -> dict[str, Any]:
    """What Serve is told about the replicas. A new version replaces them one after the other, and each finishes its requests before."""
    scaling: dict[str, Any] = {"num_replicas": settings.num_replicas}
    if settings.autoscaling is not None:
        scaling = {"autoscaling_config": settings.autoscaling.model_dump()}
    return {
        **scaling,
        "max_ongoing_requests": settings.max_ongoing_requests,
        "max_queued_requests": settings.held_requests * settings.most_replicas,
        "ray_actor_options": {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        "graceful_shutdown_timeout_s": settings.grace_period_s,
        "health_check_period_s": 10.0,
        "logging_config": {"log_level": "WARNING"},
    }
