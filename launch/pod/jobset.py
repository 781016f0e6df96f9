"""The same run as a JobSet for GKE."""

import re

from .options import ROOT, Options, matches
from .record import Run
from .terminal import UsageError, quoted


def _yaml(text: str) -> str:
    """As a single-quoted scalar, in which nothing but the quote itself has a meaning."""
    return "'" + text.replace("'", "''") + "'"


def render(run: Run, given: Options) -> str:
    """Raises UsageError for what GKE cannot do."""
    if not matches(given.image, r"[a-z0-9][A-Za-z0-9._:/@-]*"):
        raise UsageError(
            f"--image={quoted(given.image)} is not a container image; give one that holds this repository, "
            "see docs/tpu.md"
        )
    for option in ("namespace", "queue", "kubernetes_account"):
        if not matches(getattr(given, option), "([a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?)?"):
            raise UsageError(
                f"--{option.replace('_', '-')}={quoted(getattr(given, option))} is not a name of Kubernetes"
            )
    if run.slices > 1 and run.topology.num_hosts == 1:
        raise UsageError("several slices of one host each are not possible on GKE; take a larger --type")
    if not run.data.startswith("gs://"):
        raise UsageError(f"--data={run.data} must be gs://BUCKET/FOLDER on GKE, which mounts it")
    if len(run.name) > 30:  # generated names of pods hold the run's name twice
        raise UsageError(f"--name={run.name} is too long for a JobSet; at most 30 characters")
    arguments = [*given.trainer, f"--workdir={run.workdir}", "--config.data.path=/data"]
    bucket, _, folder = run.data.removeprefix("gs://").partition("/")
    values = {
        "NAME": _yaml(run.name),
        "SLICES": str(run.slices),
        "HOSTS": str(run.topology.num_hosts),
        "CHIPS_PER_HOST": str(run.topology.num_chips // run.topology.num_hosts),
        "ACCELERATOR": run.topology.chip.gke_accelerator,
        "TOPOLOGY": run.topology.sides,
        "MAX_RESTARTS": str(run.max_attempts),
        "IMAGE": _yaml(given.image),
        "DATA_BUCKET": _yaml(bucket),
        "DATA_FOLDER": folder or ".",
        "ARGUMENTS": "".join(f"\n                    - {_yaml(argument)}" for argument in arguments),
    }
    pairs = [pair.partition("=")[::2] for pair in given.env]
    environment = [f"{{name: {_yaml(name)}, value: {_yaml(value)}}}" for name, value in pairs]
    for pair in given.secret:
        name, secret, key = re.split("[=:]", pair)
        reference = f"{{secretKeyRef: {{name: {_yaml(secret)}, key: {_yaml(key)}}}}}"
        environment.append(f"{{name: {_yaml(name)}, valueFrom: {reference}}}")
    values["ENVIRONMENT"] = "\n                    - ".join(environment)
    values |= {"NAMESPACE": given.namespace, "QUEUE": given.queue, "SERVICE_ACCOUNT": given.kubernetes_account}
    only = {"spot": run.tier == "spot", "namespace": given.namespace, "queue": given.queue, "environment": environment}
    only |= {"account": given.kubernetes_account}
    lines = []
    for line in (ROOT / "launch/jobset.yaml").read_text().splitlines():
        if found := re.fullmatch(r"(.*\S) *# (\w+) only", line):
            if not only[found[2]]:
                continue
            line = found[1]
        for key, value in values.items():
            # One place a line, so that what is filled in is not looked at again.
            if f"@{key}@" in line:
                line = line.replace(f"@{key}@", value)
                break
        lines.append(line)
    return "\n".join(lines)
