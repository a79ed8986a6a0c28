"""The fields of KubeRay's resources that our manifests use, as strict JSON schemas: what is not here is refused.

Types, enumerations and required fields are those of `ray.io/v1` in KubeRay's API reference (1.6), and of Kubernetes' core/v1. A field
that a manifest needs is added here when it has been looked up there.
"""

from __future__ import annotations

from typing import Any

TEXT, FLAG = {"type": "string", "minLength": 1}, {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}  # KubeRay adds to it, and 63 is the most
LABELS = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": "^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$"},
}


def record(required: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def some(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
RESOURCES = record(("requests", "limits"), requests=QUANTITIES, limits=QUANTITIES)
FROM_SECRET = record(("secretKeyRef",), secretKeyRef=record(("name", "key"), name=TEXT, key=TEXT))
CONTAINER = record(
    ("name", "image", "resources"),
    name=NAME,
    image=TEXT,
    command=some(TEXT),
    env=some(record(("name",), name=TEXT, value={"type": "string"}, valueFrom=FROM_SECRET)),
    ports=some(record(("containerPort",), name={"type": "string", "maxLength": 15}, containerPort=PORT)),
    resources=RESOURCES,
    volumeMounts=some(record(("name", "mountPath"), name=TEXT, mountPath=TEXT)),
)
VOLUME = record(
    ("name",),
    name=TEXT,
    emptyDir=record(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
    persistentVolumeClaim=record(("claimName",), claimName=TEXT),
)
TOLERATION = record(
    key=TEXT,
    operator={"enum": ["Exists", "Equal"]},
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
)
POD = record(
    ("spec",),
    metadata=record(labels=LABELS),
    spec=record(
        ("containers",),
        serviceAccountName=TEXT,
        nodeSelector=LABELS,
        tolerations=some(TOLERATION),
        terminationGracePeriodSeconds=COUNT,
        containers=some(CONTAINER),
        volumes=some(VOLUME),
    ),
)
START = {"type": "object", "additionalProperties": {"type": "string"}}  # of `ray start`: every value is text
WORKERS = record(
    ("groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName=NAME,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=START,
    labels=LABELS,
    template=POD,
)
CLUSTER_SPEC = record(
    ("rayVersion", "headGroupSpec", "workerGroupSpecs"),
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=record(mode={"enum": ["token", "disabled"]}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=record(
        version={"enum": ["v1", "v2"]},
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        idleTimeoutSeconds=COUNT,
        resources=RESOURCES,
    ),
    gcsFaultToleranceOptions=record(
        ("redisAddress",),
        redisAddress=TEXT,
        redisPassword=record(value=TEXT, valueFrom=FROM_SECRET),
        externalStorageNamespace=TEXT,
    ),
    headGroupSpec=record(("rayStartParams", "template"), rayStartParams=START, template=POD),
    workerGroupSpecs=some(WORKERS),
)
JOB_SPEC = record(
    ("entrypoint", "rayClusterSpec"),
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterConfig=record(backoffLimit=COUNT),
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    runtimeEnvYAML=TEXT,
    rayClusterSpec=CLUSTER_SPEC,
)
SERVICE_SPEC = record(("serveConfigV2", "rayClusterConfig"), serveConfigV2=TEXT, rayClusterConfig=CLUSTER_SPEC)
CLAIM_SPEC = record(
    ("accessModes", "resources"),
    accessModes=some({"enum": ["ReadWriteOnce"]}),
    resources=record(("requests",), requests=QUANTITIES),
)
PORTS_SPEC = record(
    ("selector", "ports"), selector=LABELS, ports=some(record(("port",), name=TEXT, port=PORT)), type={"enum": ["ClusterIP"]}
)
DEPLOYMENT_SPEC = record(
    ("selector", "template"),
    replicas=COUNT,
    strategy=record(type={"enum": ["Recreate", "RollingUpdate"]}),
    selector=record(("matchLabels",), matchLabels=LABELS),
    template=POD,
)


def resource(version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    identity = {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": record(("name",), name=NAME)}
    return record(("apiVersion", "kind", "metadata", "spec"), **identity, spec=spec)


KINDS = {
    "RayCluster": resource("ray.io/v1", "RayCluster", CLUSTER_SPEC),
    "RayJob": resource("ray.io/v1", "RayJob", JOB_SPEC),
    "RayService": resource("ray.io/v1", "RayService", SERVICE_SPEC),
    "PersistentVolumeClaim": resource("v1", "PersistentVolumeClaim", CLAIM_SPEC),
    "Service": resource("v1", "Service", PORTS_SPEC),
    "Deployment": resource("apps/v1", "Deployment", DEPLOYMENT_SPEC),
}
