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

from ray.serve import Application

from puzzle_ray.serving.settings import ServeSettings


def build(args: ServeSettings) -> Application:
    """The application that the settings describe. Raises ConfigError where its engine is not installed."""
    options = deployment_options(args)
    if args.engine == "vllm":
        from actors.other_engines import build_vllm

        return build_vllm(args, options)
    if args.engine == "tensorrt_llm":
        from actors.other_engines import build_tensorrt_llm

        return build_tensorrt_llm(args, options)
    from actors.child_server import ChildServer

    return ChildServer.options(**options).bind(args.model_dump(mode="json"))  # type: ignore[attr-defined]


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
