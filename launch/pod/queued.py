"""The queued resource: one per run, under the run's name, which is what makes creating it idempotent."""

import dataclasses
import json
import time
from pathlib import Path

from .gcloud import Answer, Gcloud, Kind, seconds
from .record import Run
from .state import ABSENT, DEFAULT_VALID, SETTLE, UNKNOWN, Nodes
from .terminal import UsageError, one_line

LABEL = "run-id"
LOGIN_EXPIRED = (
    "gcloud's login has expired; run gcloud auth login. The slice is left as it is (and bills if it is up); "
    "this goes on by itself"
)


def create_command(run: Run, startup_script: str) -> list[str]:
    command = ["compute", "tpus", "queued-resources", "create", run.name, *run.place]
    command += [
        f"--accelerator-type={run.type}",
        f"--runtime-version={run.runtime_version or run.topology.chip.runtime}",
        f"--labels=run={run.name},{LABEL}={run.run_id}",
    ]
    command += [f"--node-id={run.name}"] if run.slices == 1 else []
    command += [f"--node-count={run.slices}", f"--node-prefix={run.name}"] if run.slices > 1 else []
    command += [f"--{run.tier}"] if run.tier != "on-demand" else []
    command += [f"--valid-until-duration={run.valid_until or DEFAULT_VALID}"]
    command += [f"--metadata-from-file=startup-script={startup_script}"]
    command += [f"--network={run.network}"] if run.network else []
    command += [f"--subnetwork={run.subnetwork}"] if run.subnetwork else []
    command += [f"--service-account={run.service_account}"] if run.service_account else []
    command += ["--internal-ips"] if run.internal_ips else []
    return [*command, "--quiet"]


def write_startup_script(run: Run, attempt: int, seconds_left: float) -> Path:
    """What each host does at boot: see watchdog.sh. `seconds_left` are those that slices may be up still."""
    text = (Path(__file__).parent / "watchdog.sh").read_text()
    values = {"NAME": run.name, "RUN_ID": run.run_id, "PROJECT": run.project, "ZONE": run.zone}
    values |= {"WARNING": cannot_delete_itself(run, attempt)}
    for key, value in (values | {"MAX_SECONDS": f"{seconds_left:.0f}", "MAX_HOURS": str(run.max_hours)}).items():
        text = text.replace(f"@{key}@", value)
    file = run.local / "watchdog.sh"
    file.write_text(text)
    return file


def cannot_delete_itself(run: Run, attempt: int) -> str:
    """Where a slice's watchdog writes that it may not delete the slice."""
    return f"{run.url}/attempts/{attempt}/cannot-delete-itself"


def describe_command(run: Run) -> list[str]:
    return ["compute", "tpus", "queued-resources", "describe", run.name, *run.place, "--format=json"]


def delete_command(run: Run) -> list[str]:
    return ["compute", "tpus", "queued-resources", "delete", run.name, *run.place, "--force", "--quiet"]


def node_command(run: Run, node: str) -> list[str]:
    return ["compute", "tpus", "tpu-vm", "describe", node, *run.place, "--format=csv[no-heading](state,health)"]


@dataclasses.dataclass(frozen=True)
class Request:
    """What one describe says."""

    state: str  # of the service, or ABSENT or UNKNOWN
    ours: bool = False  # it carries the run's label: the same name may be a colleague's
    trouble: str = ""  # why it is unknown
    code: str = ""  # why it failed, in the service's own words
    message: str = ""


def look(gcloud: Gcloud, run: Run) -> Request:
    """The request's state: ABSENT only on an explicit "not found"."""
    answer = gcloud.ask(*describe_command(run))
    if not answer.ok:
        return _not_seen(answer)
    try:
        found = json.loads(answer.out)
        state = found["state"]
        specs = found.get("tpu", {}).get("nodeSpec", [])
        labels = [spec.get("node", {}).get("labels", {}).get(LABEL, "") for spec in specs]
        error = state.get("failedData", {}).get("error", {})
        return Request(
            state=one_line(str(state["state"])),
            ours=bool(run.run_id) and bool(labels) and all(label == run.run_id for label in labels),
            code=one_line(str(error.get("code", ""))),
            message=one_line(str(error.get("message", "")).replace("\t", " ").replace("\n", " ")),
        )
    except (ValueError, KeyError, AttributeError, TypeError):
        return Request(UNKNOWN, trouble="cannot see the slice: gcloud's answer is not understood")


def look_surely(gcloud: Gcloud, run: Run, asked: bool) -> Request:
    """As `look`; where a request was `asked` for and never seen, finding nothing counts only again and again."""
    for _ in range(SETTLE if asked else 0):
        request = look(gcloud, run)
        if request.state != ABSENT:
            return request
        time.sleep(seconds("POLL", 30))
    return look(gcloud, run)


def _not_seen(answer: Answer) -> Request:
    if "Invalid choice: 'queued-resources'" in answer.error:
        raise UsageError("this gcloud is too old: 467.0.0 or newer is needed; gcloud components update")
    if answer.kind is Kind.ABSENT:
        return Request(ABSENT)
    trouble = LOGIN_EXPIRED if answer.kind is Kind.AUTH else f"cannot see the slice: {answer.reason}"
    return Request(UNKNOWN, trouble=trouble)


def foreign(run: Run) -> str:
    return (
        f"a queued resource {run.name} exists in {run.zone} that this run did not make; choose another --name, or "
        "delete it yourself"
    )


def look_at_nodes(gcloud: Gcloud, run: Run) -> tuple[Nodes, str]:
    """How the nodes are, the worst first, and which one is not ready."""
    nodes, detail = Nodes.READY, ""
    for index in range(run.slices):
        node = run.node(index)
        answer = gcloud.ask(*node_command(run, node))
        if not answer.ok:
            return Nodes.GONE if answer.kind is Kind.ABSENT else Nodes.UNKNOWN, f"{node}: {answer.kind}"
        state, _, health = one_line(answer.out).partition(",")
        if state == "READY" and health not in ("UNHEALTHY_MAINTENANCE", "TIMEOUT"):
            continue
        if state not in ("READY", "CREATING", "STARTING", "RESTARTING", "REPAIRING", "REIMAGING", "UNKNOWN", ""):
            return Nodes.GONE, f"{node} is {state}"
        nodes, detail = Nodes.WAIT, f"{node} is {state}{', ' + health if health else ''}"
    return nodes, detail


def delete(gcloud: Gcloud, run: Run) -> Answer:
    """Deletes the request and its nodes, if it is ours still: since the caller's look the machine may have slept."""
    request = look(gcloud, run)
    if request.state == ABSENT:
        return Answer(Kind.OK)
    if not request.ours:
        return Answer(Kind.CONFLICT, error=request.trouble or foreign(run))
    answer = gcloud.call(*delete_command(run), limit=seconds("DELETE", 900))
    return Answer(Kind.OK) if answer.kind is Kind.ABSENT else answer
