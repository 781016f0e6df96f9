#!/usr/bin/env bash
# From this machine to a finished run on a Cloud TPU slice. See "From nothing to a running pod" in README.md.
# shellcheck disable=SC2034 # what is set here is used by the parts
set -uo pipefail

usage() {
  cat <<'END'
launch/tpu_pod.sh submit --name NAME --type v4-32 --zone us-central2-b --project P --bucket gs://B
                         --spot | --reserved | --on-demand [options] -- --config=configs/c4.py:d12 [trainer's flags]
launch/tpu_pod.sh status | logs [--host N] [-f] | tensorboard | ssh [--host N] | stop | delete [--yes] | list
launch/tpu_pod.sh render-jobset [submit's options] --image IMAGE -- [trainer's flags]

submit runs to the end of the slice, and again after any failure goes on from where it was. Its options:
  --watch               make a new slice after each preemption, until the run is finished
  --detach              --watch, in the background: a user systemd unit, or tmux
  --dry-run             print every command, change nothing
  --slices N            several slices, joined over the data centre's network (1)
  --data gs://B/DIR     the prepared dataset, mounted on each host; or a path all hosts have (BUCKET/data/CONFIG)
  --workdir gs://B/DIR  checkpoints, TensorBoard, result; or a path all hosts share (BUCKET/runs/NAME/workdir)
  --max-attempts N      slices that are asked for at most (100)
  --max-hours N         hours that slices may be up in all (720)
  --valid-until 6h      give up if no slice was granted by then
  --price USD           per chip and hour, for the cost in status
  --no-plan             do not ask the TPU compiler first whether the run fits
  --network, --subnetwork, --service-account, --internal-ips    as gcloud's
  --take-over           watch a run whose watcher on another machine is gone
The others take --name NAME (by default the last one submitted) and, on another machine, --bucket gs://B.
END
}

say() { printf '%(%H:%M:%S)T %s\n' -1 "$*"; }
# die: a mistake, nothing was changed. stop: something else is in the way; running again goes on.
die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}
stop() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}
# Of a watcher: the run is not over, but this cannot go on, and no slice was left behind.
fail() {
  event failed "$*" || true
  write_lock failed || true
  stop "$*"
}
# A sleep that a signal ends at once.
pause() {
  sleep "$1" &
  wait $!
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "bash is $BASH_VERSION; 4.4 or newer is needed"
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P) || exit 1
STATE=${XDG_STATE_HOME:-$HOME/.local/state}/tpu_pod
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
[ -x "$PYTHON" ] || PYTHON=$(command -v "$PYTHON" || command -v python3) || PYTHON=python3
# Seconds: between looks, before a second try, for a granted slice to come up, for a node under repair, for a host to
# write something. Tests shorten them.
POLL_SECONDS=${TPU_POD_POLL_SECONDS:-30} RETRY_SECONDS=${TPU_POD_RETRY_SECONDS:-2}
PROVISION_SECONDS=${TPU_POD_PROVISION_SECONDS:-7200} REPAIR_SECONDS=${TPU_POD_REPAIR_SECONDS:-3600}
SILENT_SECONDS=${TPU_POD_SILENT_SECONDS:-1200} DELETE_TRIES=${TPU_POD_DELETE_TRIES:-60}
# shellcheck source=launch/pod/slices.sh
. "$ROOT/launch/pod/slices.sh"
# shellcheck source=launch/pod/options.sh
. "$ROOT/launch/pod/options.sh"
# shellcheck source=launch/pod/gcloud.sh
. "$ROOT/launch/pod/gcloud.sh"
# shellcheck source=launch/pod/record.sh
. "$ROOT/launch/pod/record.sh"
# shellcheck source=launch/pod/checks.sh
. "$ROOT/launch/pod/checks.sh"
# shellcheck source=launch/pod/queue.sh
. "$ROOT/launch/pod/queue.sh"
# shellcheck source=launch/pod/hosts.sh
. "$ROOT/launch/pod/hosts.sh"
# shellcheck source=launch/pod/watch.sh
. "$ROOT/launch/pod/watch.sh"
# shellcheck source=launch/pod/show.sh
. "$ROOT/launch/pod/show.sh"
# shellcheck source=launch/pod/jobset.sh
. "$ROOT/launch/pod/jobset.sh"
# shellcheck source=launch/pod/submit.sh
. "$ROOT/launch/pod/submit.sh"

COMMAND=${1:-help}
[ $# -eq 0 ] || shift
case $COMMAND in
  help | --help | -h)
    usage
    exit
    ;;
  submit | status | logs | tensorboard | ssh | stop | delete | list | render-jobset) ;;
  *) die "there is no command ${COMMAND@Q}; see launch/tpu_pod.sh help" ;;
esac
ARGUMENTS=("$@")
parse_options "$@"
umask 077
TEMPORARY=$(mktemp -d "${TMPDIR:-/tmp}/tpu_pod.XXXXXX") || exit 1
trap 'rm -rf "$TEMPORARY"' EXIT
case $COMMAND in
  submit) submit ;;
  render-jobset)
    fill_defaults
    check_options
    render_jobset
    ;;
  list) list_runs ;;
  *)
    choose_run "$([ "$COMMAND" != delete ] || echo surely)"
    case $COMMAND in
      status) show_status ;;
      logs) show_logs ;;
      ssh) open_ssh ;;
      tensorboard) open_tensorboard ;;
      stop) stop_run ;;
      delete) delete_run ;;
    esac
    ;;
esac
