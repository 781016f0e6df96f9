"""submit: check, record, then watch. Run again it does the same, and finds done what was done."""

import dataclasses
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from . import checks, code, environment, hosts, options, queued, record, watch
from .clock import clock_commands
from .gcloud import Gcloud, Kind, seconds
from .history import History
from .lock import Lock
from .options import ROOT, Options
from .places import delete_elsewhere
from .record import Run
from .state import ABSENT, UNKNOWN
from .terminal import BlockedError, UsageError, one_line, pasteable, say


def fill_defaults(gcloud: Gcloud, given: Options) -> None:
    """Project and zone that were not given are those of gcloud's configuration."""
    for field, key in (("project", "project"), ("zone", "compute/zone")):
        if not getattr(given, field) and not given.dry_run:
            answer = gcloud.call("config", "get", key)
            setattr(given, field, (answer.out.splitlines() or [""])[-1] if answer.ok else "")
    if not given.project:
        raise UsageError("--project is missing, and gcloud has no default; gcloud projects list shows yours")
    if not given.zone:
        raise UsageError("--zone is missing, and gcloud has no default; e.g. --zone us-central2-b")


def submit(given: Options, temporary: Path) -> int:
    """Returns the exit code."""
    gcloud = Gcloud()
    fill_defaults(gcloud, given)
    options.check(given)
    environment.check(given)
    run = record.from_options(given)
    config = next(a for a in given.trainer if a.startswith("--config="))[len("--config=") :].partition(":")[0]
    if given.dry_run:
        return _dry_run(gcloud, run, given, code.choose(temporary, config, quiet=True), temporary)
    checks.check_cloud(gcloud, run, temporary)
    chosen = code.choose(temporary, config)
    run.tree, run.commit, run.code_sha256 = chosen.tree, chosen.commit, chosen.sha256
    flags = "".join(f"{line}\n" for line in [*given.trainer, *environment.lines(given)])
    run.flags_sha256 = hashlib.sha256(flags.encode()).hexdigest()
    for place in dict.fromkeys(kind for _, kind in run.places):
        checks.check_config(gcloud, dataclasses.replace(run, type=place), chosen, given.trainer, temporary)
    run.local.mkdir(parents=True, exist_ok=True)
    if not given.no_plan:
        checks.check_plan(run, chosen, given.trainer)
    _confirm_other_code(gcloud, run, given)
    checks.check_slices_account(gcloud, run)
    _confirm_cost(run, given)
    if given.detach:
        return _detach(given, run)
    lock = Lock(gcloud, run.url, run.name)
    lock.take(given.take_over)
    (run.local / "watching").touch()
    history = History(gcloud, run)
    history.load()
    _claim_name(gcloud, run, temporary, history.asked)
    (record.STATE / "last").write_text(f"{run.name}\n")
    resubmitted = _same_flags(gcloud, run, given) if history.attempt else True
    if history.last == "finished" and resubmitted:
        return _finished_already(gcloud, run, lock, history)
    arguments = run.local / "trainer.args"
    arguments.write_text(flags)
    code.upload(gcloud, run, chosen, arguments)
    if trouble := history.add("submitted", f"commit {run.commit[:12]}, code {run.tree[:12]}"):
        raise BlockedError(f"cannot write to {run.url}: {trouble}")
    end = watch.Watcher(gcloud, run, lock, history, given.watch, resubmitted, given.notify).watch()
    return watch.finish(end, gcloud, run, lock, history)


def _confirm_other_code(gcloud: Gcloud, run: Run, given: Options) -> None:
    """Asks before a trainer that is at work is restarted on other code or flags. Raises UsageError at no."""
    found = gcloud.cat(f"{run.url}/run")
    if given.yes or not found.ok:
        return
    old, history = record.parse(found.out, f"{run.url}/run"), History(gcloud, run)
    history.load()
    workers, _ = hosts.read_workers(gcloud, run, history.attempt)
    if not any(worker.state in ("running", "restarting") for worker in workers):
        return
    what = "code" if old.tree != run.tree else "" if _same_flags(gcloud, run, given) else "flags"
    if not what or queued.look(gcloud, old).state != "ACTIVE":
        return
    if not yes(f"run {run.name} is training with other {what}. Restart it with these? [y/N] "):
        trees = f"{old.tree[:12]}, this is {run.tree[:12]}"
        raise UsageError(f"run {run.name} is training with other {what} ({trees}); --yes restarts it with these")


def _confirm_cost(run: Run, given: Options) -> None:
    """Says what the run may cost, and asks where somebody can answer. Raises UsageError at no."""
    places = [dataclasses.replace(run, type=kind) for _, kind in run.places]
    chips = max(place.chips for place in places)
    text = f"at most {run.max_hours} h of {chips} chips = {run.max_hours * chips} chip-hours"
    if all(place.rate[0] for place in places):
        hour, source = max((place.chips * place.rate[0], place.rate[1]) for place in places)
        text += f": ${hour:.2f} an hour, at most ${hour * run.max_hours:.2f}"
        if not run.price:
            text += f", by {source}{' (spot costs less)' if run.tier == 'spot' else ''}; --price gives another"
        if given.max_cost:
            text += f"; --max-cost={given.max_cost} is {run.max_hours} h at that price"
    else:
        text += " (no price known; give --price. --max-hours is the limit)"
    say(text)
    if not given.yes and sys.stdin.isatty() and not yes("Go on? [y/N] "):
        raise UsageError("nothing was created; answer y, or give --yes")


def yes(question: str) -> bool:
    try:
        return input(question) in ("y", "Y")
    except EOFError:
        return False


def _same_flags(gcloud: Gcloud, run: Run, given: Options) -> bool:
    """Whether the last submit had the same: what it brought to its end is not done again, other flags ask for more."""
    answer = gcloud.cat(f"{run.url}/trainer.args")
    if answer.kind is Kind.ABSENT:
        return False
    if not answer.ok:
        raise BlockedError(f"cannot read {run.url}/trainer.args: {answer.reason}")
    return answer.out == "\n".join([*given.trainer, *environment.lines(given)])


def attach(gcloud: Gcloud, run: Run, given: Options) -> int:
    """Watches a run from any machine, with the code and the flags that are recorded."""
    lock = Lock(gcloud, run.url, run.name)
    lock.take(given.take_over)
    history = History(gcloud, run)
    history.load()
    if history.last == "finished":
        return _finished_already(gcloud, run, lock, history)
    end = watch.Watcher(gcloud, run, lock, history, watch=True, notify=given.notify).watch()
    return watch.finish(end, gcloud, run, lock, history)


def _finished_already(gcloud: Gcloud, run: Run, lock: Lock, history: History) -> int:
    if not delete_until_gone(gcloud, run, history):
        return 1
    lock.leave("finished")
    say(f"run {run.name} is finished already, and has no slice; for another run choose another --name")
    watch.report_result(gcloud, run)
    return 0


def _claim_name(gcloud: Gcloud, run: Run, temporary: Path, asked: bool) -> None:
    """The record is made once for all machines: a name that is in use elsewhere would mean two slices for one run."""
    file, url = temporary / "run", f"{run.url}/run"
    file.write_text(run.text())
    answer = gcloud.put(file, url, "--if-generation-match=0")
    if not answer.ok and answer.kind not in (Kind.CONFLICT, Kind.EXISTS):
        raise BlockedError(f"cannot write to {run.url}: {answer.reason}")
    if not answer.ok:
        found = gcloud.cat(url)
        if not found.ok:
            raise BlockedError(f"cannot read {url}: {found.reason}")
        old = record.parse(found.out, url)
        run.run_id = old.run_id or run.run_id
        if (old.zone, old.type) in run.places:  # where it was left
            run.zone, run.type = old.zone, old.type
        run.left_zones = ",".join([*old.other_zones, *([old.zone] if old.zone != run.zone else [])])
        file.write_text(run.text())
        for key in ("project", "zone", "type", "slices"):
            if getattr(old, key) != getattr(run, key):
                _old_place_is_empty(gcloud, old, key, asked)
        answer = gcloud.put_surely(file, url)
        if not answer.ok:
            raise BlockedError(f"cannot write to {run.url}: {answer.reason}")
    shutil.copy(file, run.local / "run")


def _old_place_is_empty(gcloud: Gcloud, old: Run, key: str, asked: bool) -> None:
    """A run may move to another slice, since its checkpoints fit any; but only when the old slice is surely gone."""
    request = queued.look_surely(gcloud, old, asked)
    if request.trouble:
        raise BlockedError(f"cannot tell whether the run's slice in {old.zone} is gone: {request.trouble}")
    if request.state != ABSENT and request.ours:
        raise UsageError(
            f"run {old.name} has a slice ({one_line(request.state)}) with {key.upper()}={getattr(old, key)} "
            f"in {old.zone}; launch/tpu_pod.sh delete --name {old.name} first, or choose another --name"
        )


def delete_until_gone(gcloud: Gcloud, run: Run, history: History) -> bool:
    """Deletes the slice and returns when it is surely gone, or False where that could not be brought about in time.

    Raises:
      UsageError: the slice under this name is not the run's.
    """
    for attempt in range(int(os.environ.get("TPU_POD_DELETE_TRIES", "60"))):
        request = queued.look_surely(gcloud, run, history.asked and not attempt)
        if request.state == ABSENT:
            if history.slice_is_up:
                history.add("gone")
            if not delete_elsewhere(gcloud, run):
                return True
            continue
        if request.state != UNKNOWN and not request.ours:
            raise UsageError(queued.foreign(run))
        if request.state not in (UNKNOWN, "DELETING"):
            answer = queued.delete(gcloud, run)
            if not answer.ok:
                say(f"deleting failed, trying again: {answer.reason}")
        # The first look is right after the delete, which has waited for the operation.
        if attempt:
            time.sleep(seconds("POLL", 30))
    say(f"{run.name} IS NOT KNOWN TO BE GONE AND MAY STILL BILL; run launch/tpu_pod.sh delete --name {run.name}")
    return False


# What the watcher's gcloud needs, and a service of the user or a server of tmux that runs already has not got.
_KEPT = re.compile(
    r"PATH|HOME|XDG_STATE_HOME|CLOUDSDK_.*|GOOGLE_.*|TPU_POD_.*|.*_proxy|.*_PROXY|SSH_AUTH_SOCK|SSL_CERT_.*|REQUESTS_CA_BUNDLE|FAKE_.*"
)


def _detach(given: Options, run: Run) -> int:
    """Everything was checked here, where it can be read; what is left goes on without this terminal."""
    at = given.arguments.index("--") if "--" in given.arguments else len(given.arguments)
    own = ["--watch" if argument == "--detach" else argument for argument in given.arguments[:at]]
    own += [] if given.yes else ["--yes"]  # asked here
    kept = {key: value for key, value in os.environ.items() if _KEPT.fullmatch(key)}
    log, ended, watching = run.local / "watcher.log", run.local / "watcher.ended", run.local / "watching"
    submit = shlex.join(["bash", str(ROOT / "launch/tpu_pod.sh"), "submit", *own, *given.arguments[at:]])
    # In a file that only this person reads: systemd would expand $ in words, and everybody sees those of a process.
    script = run.local / "detached.sh"
    script.unlink(missing_ok=True)
    lines = [
        f"export {key}={shlex.quote(value)}" for key, value in (kept | {"PYTHON": checks.trainer_python()}).items()
    ]
    lines += [f"{submit} >>{shlex.quote(str(log))} 2>&1", f"echo $? >{shlex.quote(str(ended))}"]
    script.write_text("\n".join(['rm -- "$0"', *lines, ""]))
    command = ["bash", str(script)]
    for file in (ended, watching):
        file.unlink(missing_ok=True)
    unit = f"tpu-pod-{run.name}"
    if shutil.which("systemd-run") and _succeeds("systemctl", "--user", "show-environment"):
        if not _succeeds("systemd-run", "--user", "--collect", "--quiet", f"--unit={unit}", "--", *command):
            raise BlockedError("systemd-run failed; use --watch in a terminal that stays open")
        where = f"as the user unit {unit}; loginctl enable-linger keeps it after you log out"
    elif shutil.which("tmux"):
        if not _succeeds("tmux", "new-session", "-d", "-s", unit, "--", *command):
            raise BlockedError(f"tmux failed; is a session {unit} running already?")
        where = f"in the tmux session {unit}"
    else:
        raise UsageError(
            "--detach needs a user systemd or tmux; install tmux, or use --watch in a terminal that stays open"
        )
    say("started; waiting until it has the run")
    for _ in range(3000):
        if watching.exists():
            say(f"watching {where}")
            say(f"its output: {log}; launch/tpu_pod.sh status --name {run.name}")
            return 0
        if ended.exists():
            break
        time.sleep(0.1)
    last = log.read_text(errors="replace").splitlines()[-3:] if log.exists() else []
    raise BlockedError(f"the watcher did not begin, see {log}: {' '.join(last)}")


def _succeeds(*command: str) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


def _dry_run(gcloud: Gcloud, run: Run, given: Options, chosen: code.Code, temporary: Path) -> int:
    """Prints every command that submit --watch would run until the first slice is finished, in order."""
    mesh = checks.check_config(gcloud, run, chosen, given.trainer, temporary, dry_run=True)
    run.tree, run.run_id, run.code_sha256, run.flags_sha256 = "TREE", "RUN_ID", "SHA256", "FLAGS_SHA256"
    cp = ["storage", "cp", "--quiet"]
    once = [*cp, "--if-generation-match=0"]
    lines = [
        f"# run {run.name}: {run.slices} x {run.type} ({run.tier}), topology {run.topology.sides}, {run.hosts} hosts, "
        f"{run.chips} chips",
        *(f"# {line}" for line in mesh.splitlines()),
        "# environment of every trainer: JAX_PLATFORMS=tpu,cpu; coordinator and process id from the TPU VM's metadata",
        *(f"# {line}" for line in environment.lines(given)),
        f"# workdir {run.workdir}, dataset {run.data}",
        "# --- check",
        _gcloud(*checks.account_command()),
        _gcloud(*checks.type_command(run)),
        _gcloud(*checks.policy_command(run)),
        *([_gcloud("storage", "cat", f"{run.data}/manifest.json")] if run.data.startswith("gs://") else []),
        *([] if given.no_plan else [pasteable("python", *checks.plan_command(run, given.trainer))]),
        "# --- record the run and its code (TREE is that of git, RUN_ID is random)",
        _gcloud(*once, "watch", f"{run.url}/watch"),
        _gcloud(*once, "run", f"{run.url}/run"),
        pasteable("git", "archive", "--format=tar.gz", "-o", "TREE.tar.gz", "TREE"),
        _gcloud(*cp, "TREE.tar.gz", f"{run.url}/code/TREE.tar.gz"),
        _gcloud(*cp, "uncommitted.patch", f"{run.url}/code/TREE.patch"),
        _gcloud(*cp, "trainer.args", f"{run.url}/trainer.args"),
        *(_gcloud(*command) for command in clock_commands(run.url, "clock")),
        _gcloud(*cp, "events", f"{run.url}/events"),
        "# --- ask for the slice, and look at it until it is ACTIVE and its nodes READY",
        _gcloud(*queued.create_command(run, "watchdog.sh")),
        _gcloud(*queued.describe_command(run)),
        *(_gcloud(*queued.node_command(run, run.node(index))) for index in range(run.slices)),
    ]
    for verb in ("setup", "start"):
        lines.append(f"# --- {verb} all hosts")
        lines += [_gcloud(*hosts.ssh_command(run, 1, host, verb)) for host in range(run.hosts)]
    lines += [
        "# --- follow, until host 0 says that the run is finished",
        _gcloud("storage", "cat", f"{run.url}/attempts/1/host-*.status"),
        "# --- end the billing",
        _gcloud(*queued.delete_command(run)),
    ]
    print("\n".join(lines), flush=True)
    return 0


def _gcloud(*arguments: str) -> str:
    return pasteable("gcloud", *arguments)
