"""The commands on a run that exists."""

import os
import re
import subprocess
import threading
import time
from pathlib import Path

from . import checks, hosts, options, queued, record
from .gcloud import Gcloud, Kind, seconds
from .history import History
from .lock import Lock, shown
from .logs import Log
from .options import Options
from .record import Run
from .state import ABSENT, UNKNOWN
from .submit import delete_until_gone, yes
from .terminal import BlockedError, UsageError, one_line, quoted, say


def choose_run(gcloud: Gcloud, given: Options) -> Run:
    """The run of --name; without it the only one there is, or the last one submitted. Raises UsageError."""
    last, runs = record.STATE / "last", record.STATE / "runs"
    if not given.name and last.exists():
        given.name = last.read_text().strip()
        known = len(list(runs.glob("*/run")))
        if given.command == "delete" and known != 1:
            raise UsageError(f"there are {known} runs; say which: delete --name {given.name}")
    if not given.name:
        raise UsageError("no run was submitted from this machine; give --name NAME --bucket gs://BUCKET")
    options.check_name(given.name)
    file = runs / given.name / "run"
    if given.bucket:
        options.check_bucket(given.bucket)
    elif not file.exists():
        raise UsageError(
            f"no run {given.name} was submitted from this machine; list shows those that were, or add --bucket"
        )
    return _recorded_run(gcloud, given.name, given.bucket or record.load(file).bucket, file)


def _recorded_run(gcloud: Gcloud, name: str, bucket: str, file: Path) -> Run:
    """The bucket's record, since a watcher elsewhere may have moved the run; this machine's where that is not read."""
    url = f"{bucket}/runs/{name}/run"
    answer = gcloud.cat(url)
    if not answer.ok and (not file.exists() or (known := record.load(file)).bucket != bucket):
        raise UsageError(f"there is no run {name} in {bucket} ({answer.kind}); list shows those of this machine")
    if not answer.ok:
        say(f"cannot read {url} ({answer.kind}); by this machine's record the run is in {known.zone}")
        return known
    run = record.parse(answer.out, url)
    if (run.name, run.bucket) != (name, bucket):
        raise UsageError(f"the record {url} is of another run, {run.name} in {run.bucket}; delete that file")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(run.text())
    return run


def status(gcloud: Gcloud, run: Run) -> int:
    history = History(gcloud, run)
    history.load()
    request = queued.look(gcloud, run)
    trouble = f" ({request.trouble})" if request.trouble else ""
    print(f"run       {run.name}: {run.slices} x {run.type} ({run.tier}) in {run.zone}, project {run.project}")
    owner = "" if request.ours or request.state in (ABSENT, UNKNOWN) else ", of somebody else"
    print(f"slice     {request.state}{owner}{trouble}")
    if request.state not in (ABSENT, UNKNOWN):
        warning = gcloud.cat(queued.cannot_delete_itself(run, history.attempt))
        if warning.ok:
            print(f"WARNING   {one_line(warning.out)}")
    print(f"attempts  {history.attempt} of {run.max_attempts}")
    answer = gcloud.cat(f"{run.url}/watch")
    print(f"watcher   {shown(answer.out) if answer.ok else f'none ({answer.kind})'}")
    print(_progress(gcloud, run))
    print(_cost(run, history))
    workers, kind = hosts.read_workers(gcloud, run, history.attempt)
    if kind not in (Kind.OK, Kind.ABSENT):
        print(f"workers   cannot be read ({kind})")
    for worker in workers:
        detail = f": {worker.detail}" if worker.detail else ""
        print(f"host {worker.host}    {worker.state}, exit code {worker.code}, {worker.restarts} restarts{detail}")
    print("history")
    for event in history.events[-8:]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
        print(f"  {when}  {one_line(event.name)} {one_line(event.detail)}")
    return 0


def _progress(gcloud: Gcloud, run: Run) -> str:
    """Step, loss and goodput, as the trainer last wrote them."""
    folder = run.workdir if run.workdir.startswith("gs://") else run.url
    answer = gcloud.cat(f"{folder}/goodput.json")
    if not answer.ok:
        return "progress  nothing yet"
    values = []
    for key in ("highest_step", "loss", "goodput", "starts"):
        found = re.search(rf'"{key}": *([0-9.eE+-]*)', answer.out)
        values.append(f"{key.removeprefix('highest_')} {found[1] if found else ''}  ")
    return f"progress  {''.join(values)}"


def _cost(run: Run, history: History) -> str:
    hours = history.billed() / 3600
    text = f"cost      slices were up for {hours:.2f} h = {hours * run.chips:.1f} chip-hours"
    dollars, source = run.rate
    if dollars:
        text += f" = ${hours * run.chips * dollars:.2f} at {source}"
    return f"{text}, and {'one is up' if history.slice_is_up else 'none is up now'}"


def logs(gcloud: Gcloud, run: Run, given: Options) -> int:
    every = given.host == "all"
    chosen = list(range(run.hosts)) if every else [_host(run, given)]
    for option in ("tail", "attempt"):
        if not re.fullmatch("[1-9][0-9]{0,6}|", getattr(given, option)):
            raise UsageError(f"--{option}={quoted(getattr(given, option))} must be a whole number, at least 1")
    history = History(gcloud, run)
    history.load()
    if not history.attempt:
        raise UsageError(f"run {run.name} has had no slice yet, so there is no log")
    if given.follow:
        return _follow_logs(gcloud, run, history, chosen)
    attempt = int(given.attempt or history.attempt)
    for host in chosen:
        Log(gcloud, run, host, f"host {host}: " if every else "").show(attempt, int(given.tail or 0))
    return 0


def _follow_logs(gcloud: Gcloud, run: Run, history: History, chosen: list[int]) -> int:
    """Until the run is at its end."""
    followed = [Log(gcloud, run, host, f"host {host}: " if len(chosen) > 1 else "") for host in chosen]
    attempt = history.attempt
    while True:
        history.load()
        if history.attempt != attempt:  # another slice begins another log
            for log in followed:
                log.restart()
            attempt = history.attempt
        workers, _ = hosts.read_workers(gcloud, run, attempt)
        for log in followed:
            log.follow(workers, attempt)
        if history.last in ("finished", "failed", "deleted"):
            say(f"the run is at its end: {history.last} {history.events[-1].detail}".rstrip())
            return 0
        time.sleep(seconds("POLL", 30))


def _host(run: Run, given: Options) -> int:
    if given.host and (not re.fullmatch("[0-9]{1,4}", given.host) or int(given.host) >= run.hosts):
        raise UsageError(
            f"--host={quoted(given.host)} is not a host of {run.slices} x {run.type}; "
            f"choose one from 0 to {run.hosts - 1}"
        )
    return int(given.host or 0)


def ssh(gcloud: Gcloud, run: Run, given: Options) -> int:
    """Only into the run's own slice. With --forward a port of the host is one of this machine too, while that lasts."""
    if not re.fullmatch("[1-9][0-9]{0,4}|", given.forward):
        raise UsageError(f"--forward={quoted(given.forward)} must be a port's number, e.g. 9012 of the profiler")
    request = queued.look(gcloud, run)
    if request.state == UNKNOWN:
        raise BlockedError(request.trouble)
    if request.state == ABSENT:  # a node of the name, if there is one, is somebody else's
        raise UsageError(f"run {run.name} has no slice in {run.zone}; launch/tpu_pod.sh status shows what became of it")
    if not request.ours:
        raise UsageError(queued.foreign(run))
    port = ["--", "-L", f"{given.forward}:localhost:{given.forward}"] if given.forward else []
    return subprocess.run(["gcloud", *hosts.node_ssh(run, _host(run, given)), *port]).returncode


def tensorboard(gcloud: Gcloud, run: Run) -> int:
    """On a copy that is refreshed: works with the bucket alone, and after the slice is gone."""
    if not run.workdir.startswith("gs://"):
        raise UsageError(f"the workdir {run.workdir} is on the hosts; run tensorboard --logdir {run.workdir} there")
    python = checks.trainer_python()
    if subprocess.run([python, "-c", "import tensorboard"], capture_output=True).returncode != 0:
        raise UsageError(f"{python} has no TensorBoard; run make setup, or set PYTHON")
    folder = run.local / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    copy = ["storage", "rsync", "--recursive", "--quiet", f"{run.workdir}/tensorboard", str(folder)]
    answer = gcloud.call(*copy, limit=900)
    if not answer.ok:
        raise UsageError(f"no events yet: {answer.reason}")
    done = threading.Event()

    def refresh() -> None:
        while not done.wait(60):
            gcloud.call(*copy, limit=900)

    refresher = threading.Thread(target=refresh, daemon=True)
    refresher.start()
    try:
        return subprocess.run([python, "-m", "tensorboard.main", "--logdir", str(folder)]).returncode
    finally:
        done.set()
        gcloud.processes.end()


def stop(gcloud: Gcloud, run: Run) -> int:
    """Ends the watcher first, which would otherwise make a new slice."""
    history = _seize(gcloud, run, "stopped")
    request = queued.look_surely(gcloud, run, history.asked)
    if request.state == UNKNOWN:
        raise BlockedError(f"{request.trouble}; the watcher was ended, delete ends the billing")
    if request.state == ABSENT:
        say("there is no slice, so nothing bills; submit goes on from the last checkpoint")
        return 0
    if not request.ours:
        raise UsageError(queued.foreign(run))
    if request.state != "ACTIVE":  # it might be granted when nobody looks any more
        say(f"the slice is not up ({request.state}), so the request is deleted")
        if not delete_until_gone(gcloud, run, history):
            return 1
        history.add("stopped")
        say("the request is gone, nothing bills; submit goes on from the last checkpoint")
        return 0
    if not hosts.save(run, history.attempt):
        raise BlockedError("not every host stopped; delete ends the billing all the same")
    history.add("stopped")
    say("saved and stopped. THE SLICE IS UP AND BILLS: submit goes on with it, delete ends it")
    return 0


def delete(gcloud: Gcloud, run: Run, given: Options) -> int:
    if not given.yes:
        place = f"{run.slices} x {run.type} in {run.zone}"
        if not yes(f"delete the slice of run {run.name} ({place})? The checkpoints stay. [y/N] "):
            raise UsageError("nothing was deleted; answer y, or give --yes")
    try:
        history = _seize(gcloud, run, "deleted")
    except BlockedError as error:
        say(f"{error}. Deleting all the same; a watcher that can reach the bucket would make a new slice: end it first")
        history = History(gcloud, run)
        history.load(bucket_needed=False)
    # The trainers save first; whether that works or not, the slice goes.
    request = queued.look(gcloud, run)
    if request.state == "ACTIVE" and request.ours:
        hosts.save(run, history.attempt)
    if not delete_until_gone(gcloud, run, history):
        return 1
    history.add("deleted")
    say(f"the slice is gone, nothing bills; the run is kept in {run.url}")
    return 0


def _seize(gcloud: Gcloud, run: Run, word: str) -> History:
    lock, history = Lock(gcloud, run.url, run.name), History(gcloud, run)
    lock.seize(f"{word} by {os.environ.get('USER') or os.getuid()} on {os.uname().nodename}")
    history.load()
    return history


def list_runs(gcloud: Gcloud, given: Options) -> int:
    """Those of a bucket with their owners and watchers, or those of this machine."""
    runs = _recorded(gcloud, given.bucket) if given.bucket else []
    if not given.bucket:
        runs = [record.load(file) for file in sorted((record.STATE / "runs").glob("*/run"))]
    for run in runs:
        request = queued.look(gcloud, run)
        state = request.state if request.ours or request.state in (ABSENT, UNKNOWN) else "of somebody else"
        line = f"{run.name:24} {run.slices} x {run.type:12} {run.zone:16} {state}"
        if given.bucket:
            answer = gcloud.cat(f"{run.url}/watch")
            line = f"{line:64} {run.owner or 'owner unknown':28} {shown(answer.out) if answer.ok else answer.kind}"
        print(line)
    if not runs:
        print(f"no run is in {given.bucket}" if given.bucket else "no run was submitted from this machine")
    return 0


def _recorded(gcloud: Gcloud, bucket: str) -> list[Run]:
    options.check_bucket(bucket)
    answer = gcloud.cat(f"{bucket}/runs/*/run")
    if answer.kind is Kind.ABSENT:
        return []
    if not answer.ok:
        raise BlockedError(f"cannot read {bucket}: {answer.reason}")
    records = re.split("^(?=NAME=)", answer.out, flags=re.MULTILINE)
    return [record.parse(text, f"in {bucket}/runs") for text in records if text.strip()]
