"""From this machine to a finished run on a Cloud TPU slice. See "From nothing to a running pod" in docs/tpu.md."""

import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from . import environment, jobset, options, record, show, submit
from .gcloud import Gcloud
from .options import Options
from .terminal import BlockedError, Interrupted, UsageError, quoted, say

USAGE = """\
launch/tpu_pod.sh submit --name NAME --type v4-32 --zone us-central2-b --project P --bucket gs://B
                         --spot | --reserved | --on-demand [options] -- --config=configs/c4.py:d12 [trainer's flags]
launch/tpu_pod.sh attach --name NAME --bucket gs://B       watch it, from any machine, with its recorded code
launch/tpu_pod.sh status | tensorboard | ssh [--host N] [--forward PORT] | stop | delete [--yes] | list
launch/tpu_pod.sh logs [--host N|all] [--attempt N] [--tail LINES] [-f]
launch/tpu_pod.sh render-jobset [submit's options] --image IMAGE [--namespace N] [--queue KUEUE]
                         [--kubernetes-account A] [--secret NAME=SECRET:KEY] -- [trainer's flags]

submit runs to the end of the slice, and again after any failure goes on from where it was. Its options:
  --watch               make a new slice after each preemption, until the run is finished
  --detach              --watch, in the background: a user systemd unit, or tmux
  --dry-run             print every command, change nothing
  --slices N            several slices, joined over the data centre's network (1)
  --data gs://B/DIR     the prepared dataset, mounted on each host; or a path all hosts have (BUCKET/data/CONFIG)
  --workdir gs://B/DIR  checkpoints, TensorBoard, result; or a path all hosts share (BUCKET/runs/NAME/workdir)
  --max-attempts N      slices that are asked for at most (100)
  --max-hours N         hours that slices may be up in all (720)
  --max-cost USD        the same in dollars, by --price or the list price
  --zones A,B --types V4,V5    tried in turn while there are no machines, instead of --zone and --type
  --notify COMMAND|URL  told when the run is preempted, failed, finished or still billing
  --valid-until 6h      give up if no slice was granted by then
  --price USD           per chip and hour, instead of the list price on demand
  --env NAME=VALUE      in the trainer's environment; as often as needed, and stored with the flags
  --secret NAME=ID[:VERSION]    the same from Secret Manager: each host fetches it, nothing stores it
  --no-plan             do not ask the TPU compiler first whether the run fits
  --network, --subnetwork, --service-account, --internal-ips, --runtime-version, --tunnel-through-iap    as gcloud's
  --yes                 do not ask before it costs, nor before a trainer at work gets other code
  --take-over           watch a run whose watcher on another machine is gone
The others take --name NAME (by default the last one submitted) and, on another machine, --bucket gs://B."""


def main(arguments: list[str]) -> int:
    command, *rest = arguments or ["help"]
    typed = rest[: rest.index("--")] if "--" in rest else rest
    if command in ("help", "--help", "-h") or {"--help", "-h"} & set(typed):
        print(USAGE)
        return 0
    try:
        if command not in options.ALLOWED:
            raise UsageError(f"there is no command {quoted(command)}; see launch/tpu_pod.sh help")
        given = options.parse(command, rest)
        os.umask(0o077)
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGTERM, _interrupt)
        with tempfile.TemporaryDirectory(prefix="tpu_pod.", ignore_cleanup_errors=True) as folder:
            return _run(given, Path(folder))
    except Interrupted as interrupted:
        return _interrupted(given, str(interrupted))
    except UsageError as mistake:
        if str(mistake):
            print(f"error: {mistake}", file=sys.stderr)
        return 2
    except BlockedError as stopped:
        print(f"error: {stopped}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1


def _run(given: Options, temporary: Path) -> int:
    if given.command == "submit":
        return submit.submit(given, temporary)
    gcloud = Gcloud()
    if given.command == "render-jobset":
        submit.fill_defaults(gcloud, given)
        options.check(given)
        environment.check(given)
        print(jobset.render(record.from_options(given), given))
        return 0
    if given.command == "list":
        return show.list_runs(gcloud, given)
    run = show.choose_run(gcloud, given)
    match given.command:
        case "attach":
            return submit.attach(gcloud, run, given)
        case "status":
            return show.status(gcloud, run)
        case "logs":
            return show.logs(gcloud, run, given)
        case "ssh":
            return show.ssh(gcloud, run, given)
        case "tensorboard":
            return show.tensorboard(gcloud, run)
        case "stop":
            return show.stop(gcloud, run)
        case _:
            return show.delete(gcloud, run, given)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for heard in (signal.SIGINT, signal.SIGTERM):
        signal.signal(heard, signal.SIG_IGN)
    raise Interrupted(signal.Signals(number).name.removeprefix("SIG"))


def _interrupted(given: Options, number: str) -> int:
    if given.command in ("submit", "attach") and not given.dry_run:
        print()
        say(
            f"interrupted ({number}). The run and its slice go on, and BILL if the slice is up; "
            "a queued request may still be granted."
        )
        say(f"Goes on: the same submit. Ends the billing: launch/tpu_pod.sh delete --name {given.name}")
    elif given.command in ("stop", "delete"):
        say(f"interrupted ({number}). The slice MAY STILL BILL; run launch/tpu_pod.sh delete --name {given.name}")
    return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
