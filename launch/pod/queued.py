"""The queued resource: one per run, under the run's name, which is what makes creating it idempotent."""

import dataclasses

from .gcloud import Answer, Gcloud, Kind, seconds
from .record import Run
from .state import ABSENT, UNKNOWN, Nodes
from .terminal import one_line

LOGIN_EXPIRED = (
    "gcloud's login has expired; run gcloud auth login. The slice is left as it is (and bills if it is up); "
    "this goes on by itself"
)


def create_command(run: Run) -> list[str]:
    command = ["compute", "tpus", "queued-resources", "create", run.name, *run.place]
    command += [
        f"--accelerator-type={run.type}",
        f"--runtime-version={run.topology.chip.runtime}",
        f"--labels=run={run.name}",
    ]
    command += [f"--node-id={run.name}"] if run.slices == 1 else []
    command += [f"--node-count={run.slices}", f"--node-prefix={run.name}"] if run.slices > 1 else []
    command += [f"--{run.tier}"] if run.tier != "on-demand" else []
    command += [f"--valid-until-duration={run.valid_until}"] if run.valid_until else []
    command += [f"--network={run.network}"] if run.network else []
    command += [f"--subnetwork={run.subnetwork}"] if run.subnetwork else []
    command += [f"--service-account={run.service_account}"] if run.service_account else []
    command += ["--internal-ips"] if run.internal_ips else []
    return [*command, "--quiet"]


def describe_command(run: Run) -> list[str]:
    return ["compute", "tpus", "queued-resources", "describe", run.name, *run.place]


def delete_command(run: Run) -> list[str]:
    return ["compute", "tpus", "queued-resources", "delete", run.name, *run.place, "--force", "--quiet"]


def node_command(run: Run, node: str) -> list[str]:
    return ["compute", "tpus", "tpu-vm", "describe", node, *run.place, "--format=csv[no-heading](state,health)"]


@dataclasses.dataclass(frozen=True)
class Request:
    """What one describe says."""

    state: str  # of the service, or ABSENT or UNKNOWN
    ours: bool = False
    trouble: str = ""  # why it is unknown
    code: str = ""
    message: str = ""


def look(gcloud: Gcloud, run: Run) -> Request:
    """The request's state: ABSENT only on an explicit "not found"."""
    answer = gcloud.ask(*describe_command(run), "--format=value(state.state)")
    if answer.ok:
        return Request(answer.out or UNKNOWN, True)
    return _not_seen(answer)


def failure(gcloud: Gcloud, run: Run) -> tuple[str, str]:
    """The service's own code and words on why a request failed."""
    form = "--format=value(state.failedData.error.code,state.failedData.error.message)"
    answer = gcloud.ask(*describe_command(run), form)
    code, _, message = answer.out.partition("\t") if answer.ok else ("", "", "")
    return one_line(code), one_line(message.replace("\t", " ").replace("\n", " "))


def _not_seen(answer: Answer) -> Request:
    if answer.kind is Kind.ABSENT:
        return Request(ABSENT)
    trouble = LOGIN_EXPIRED if answer.kind is Kind.AUTH else f"cannot see the slice: {answer.reason}"
    return Request(UNKNOWN, trouble=trouble)


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
    """Asks for the request and its nodes to be deleted; the caller looks until it is gone."""
    answer = gcloud.call(*delete_command(run), limit=seconds("DELETE", 900))
    return Answer(Kind.OK) if answer.kind is Kind.ABSENT else answer
