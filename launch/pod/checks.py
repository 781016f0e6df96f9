"""What submit makes sure of before anything is created."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

from .code import Code
from .gcloud import Answer, Gcloud, Kind
from .options import EMAIL, ROOT, matches
from .record import Run
from .terminal import BlockedError, UsageError, say

# Those that hold tpu.nodes.delete; of a role of one's own it is not known.
_MAY_DELETE = {"roles/tpu.admin", "roles/editor", "roles/owner"}
_COMPUTE_ENGINE = "-compute@developer.gserviceaccount.com"
_LOGIN = "gcloud's login has expired; run gcloud auth login"


def trainer_python() -> str:
    """The Python that has the trainer's packages."""
    default = ROOT / ".venv/bin/python"
    wanted = os.environ.get("PYTHON") or str(default)
    return shutil.which(wanted) or shutil.which("python3") or sys.executable


def account_command() -> list[str]:
    return ["auth", "list", "--filter=status:ACTIVE", "--format=value(account)"]


def type_command(run: Run) -> list[str]:
    zone, project = f"--zone={run.zone}", f"--project={run.project}"
    return ["compute", "tpus", "accelerator-types", "describe", run.type, zone, project, "--format=value(type)"]


def check_cloud(gcloud: Gcloud, run: Run, temporary: Path) -> None:
    """The person, who is the run's owner, the project, the slice type in the zone, and the bucket.

    Raises:
      UsageError, BlockedError: what has to be done first.
    """
    if shutil.which("gcloud") is None:
        raise UsageError("gcloud is not installed; see cloud.google.com/sdk/docs/install")
    answer = gcloud.ask(*account_command())
    if not answer.ok:
        raise BlockedError(f"gcloud auth list failed: {answer.reason}")
    if not answer.out:
        raise UsageError("gcloud has no account; run gcloud auth login")
    run.owner = answer.out if matches(answer.out, EMAIL) else ""  # a federated account has no address
    for zone, kind in run.places:
        _check_type(gcloud, dataclasses.replace(run, zone=zone, type=kind))
    _check_bucket(gcloud, run, temporary)


def _check_type(gcloud: Gcloud, run: Run) -> None:
    answer = gcloud.ask(*type_command(run))
    if answer.kind in (Kind.ABSENT, Kind.INVALID):
        raise UsageError(
            f"zone {run.zone} has no {run.type} for project {run.project}; "
            f"gcloud compute tpus accelerator-types list --zone={run.zone} shows what it has"
        )
    if answer.kind is Kind.PERMISSION:
        raise UsageError(
            f"project {run.project} refuses: {answer.reason}; check the project's id, that the Cloud TPU API is "
            "enabled and your role (TPU Admin)"
        )
    if answer.kind is Kind.AUTH:
        raise UsageError(_LOGIN)
    if not answer.ok:
        raise BlockedError(f"cannot ask for {run.type} in {run.zone}: {answer.reason}")


def policy_command(run: Run) -> list[str]:
    return ["projects", "get-iam-policy", run.project, "--format=json"]


def check_slices_account(gcloud: Gcloud, run: Run) -> None:
    """Says if the slice's service account lacks the role by which a slice that nobody watches deletes itself.

    It says so and goes on: a role may come from a folder or a group, which the project's policy does not show, and not
    everybody may read that. Set-up, which tries it on the slice, refuses; but it needs somebody who watches.
    """
    account = run.service_account or "the project's Compute Engine account"
    answer = gcloud.ask(*policy_command(run))
    try:
        bindings = json.loads(answer.out)["bindings"] if answer.ok else []
        held = {binding["role"] for binding in bindings if any(_is_of(run, m) for m in binding["members"])}
    except (ValueError, KeyError, TypeError):
        held, answer = set(), Answer(Kind.NETWORK, error="its policy is not understood")
    if not answer.ok:
        say(f"cannot see whether {account} has the role TPU Admin ({answer.reason}); set-up tries it on the slice")
    elif not held & _MAY_DELETE:
        member = f"serviceAccount:{run.service_account or 'NUMBER-compute@developer.gserviceaccount.com'}"
        say(
            f"WARNING: {account} has not the role TPU Admin, by the policy of the project: a slice that is granted "
            "when nobody watches COULD NOT DELETE ITSELF AND WOULD BILL until somebody deletes it; set-up refuses it. "
            f"gcloud projects add-iam-policy-binding {run.project} --role=roles/tpu.admin --member={member} gives it"
        )


def _is_of(run: Run, member: str) -> bool:
    account = member.removeprefix("serviceAccount:")
    return account == run.service_account if run.service_account else account.endswith(_COMPUTE_ENGINE)


def _check_bucket(gcloud: Gcloud, run: Run, temporary: Path) -> None:
    probe = temporary / "probe"
    probe.write_text("written by launch/tpu_pod.sh to see whether it may\n")
    answer = gcloud.put_surely(probe, f"{run.url}/probe")
    if answer.kind is Kind.ABSENT:
        raise UsageError(
            f"--bucket={run.bucket} does not exist; "
            f"gcloud storage buckets create gs://NAME --location={run.zone.rpartition('-')[0]} "
            "--soft-delete-duration=0 makes one; soft delete, which is on by default, keeps "
            "and bills deleted checkpoints for seven days"
        )
    if answer.kind is Kind.PERMISSION:
        raise UsageError(
            f"--bucket={run.bucket} cannot be written to: {answer.reason}; you need the role Storage Object Admin there"
        )
    if answer.kind is Kind.AUTH:
        raise UsageError(_LOGIN)
    if not answer.ok:
        raise BlockedError(f"cannot write to {run.bucket}: {answer.reason}")


def check_config(
    gcloud: Gcloud, run: Run, code: Code, arguments: list[str], temporary: Path, dry_run: bool = False
) -> str:
    """The config, the mesh on this many devices, and the dataset: by the trainer's own code that will be uploaded.

    Returns:
      The mesh and the batch, as lines for people.

    Raises:
      UsageError: the run could not start; launch.preflight has said why if its text is empty.
    """
    command = ["-m", "launch.preflight", f"--devices={run.chips}", f"--slices={run.slices}", f"--data={run.data}"]
    if run.data.startswith("gs://") and not dry_run:
        answer = gcloud.cat(f"{run.data}/manifest.json")
        if answer.kind is Kind.ABSENT:
            raise UsageError(
                f"--data={run.data} holds no manifest.json; prepare the dataset (docs/data.md) or name its folder"
            )
        if not answer.ok:
            raise BlockedError(f"cannot read {run.data}/manifest.json: {answer.reason}")
        (temporary / "manifest.json").write_text(answer.out + "\n")
        command.append(f"--manifest={temporary / 'manifest.json'}")
    done = subprocess.run(
        [trainer_python(), *command, "--", *arguments], cwd=code.folder, env=_environment(code), stdout=subprocess.PIPE
    )
    if done.returncode == 2:  # one line on stderr already
        raise UsageError("")
    if done.returncode != 0:
        raise UsageError(f"{trainer_python()} cannot load the trainer on this machine; run make setup, or set PYTHON")
    return done.stdout.decode().rstrip("\n")


def plan_command(run: Run, arguments: list[str]) -> list[str]:
    price = [f"--price-per-chip-hour={run.price}"] if run.price else []
    return ["-m", "launch.plan", f"--topology={run.type}", f"--slices={run.slices}", *price, *arguments]


def check_plan(run: Run, code: Code, arguments: list[str]) -> None:
    """What the TPU compiler says of this config on this slice, without one. Raises UsageError where it does not fit."""
    command = plan_command(run, arguments)
    key, planned = str(zlib.crc32("\n".join([code.tree, *command]).encode())), run.local / "planned"
    if planned.exists() and planned.read_text() == key:
        say("the plan of an earlier submit says that it fits")
        return
    say("asking the TPU compiler whether it fits: about a minute, --no-plan skips it")
    # Its exit codes: 0 fits, 2 a mistake, 3 does not.
    done = subprocess.run(
        [trainer_python(), *command], cwd=code.folder, env=_environment(code, cpu=False), capture_output=True, text=True
    )
    if done.returncode == 3:
        print(done.stdout, end="", file=sys.stderr, flush=True)
        raise UsageError(
            f"by the plan this config does not fit {run.slices} x {run.type}; "
            "change what the plan names, or the slice (--no-plan skips it)"
        )
    if done.returncode != 0:
        errors = done.stderr.splitlines() or [""]
        reason = next((line[7:] for line in reversed(errors) if line.startswith("error: ")), errors[-1])
        raise UsageError(f"launch.plan failed (exit code {done.returncode}): {reason}; mend it, or --no-plan")
    lines = done.stdout.splitlines()
    print(
        "\n".join(line for i, line in enumerate(lines) if i == 0 or re.match(r"  (total |estimated: )", line)),
        flush=True,
    )
    planned.write_text(key)


def _environment(code: Code, cpu: bool = True) -> dict[str, str]:
    """As on the hosts the model is that of the code, whatever is installed."""
    environment = os.environ | {"PYTHONPATH": str(code.folder / "model")}
    return environment | {"JAX_PLATFORMS": "cpu"} if cpu else environment
