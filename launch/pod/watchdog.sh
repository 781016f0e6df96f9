#!/usr/bin/env bash
# The startup script of every host of a slice, which launch/pod fills in between the @s. It needs no set-up: should nobody
# watch, the slice is deleted when no trainer has been at work for an hour, or when its hours are used up. It runs at
# every boot, as root; the loop goes on in a unit of its own.
#
# The worker touches ~/runs/NAME/beat while a trainer runs. What it deletes is the request that this machine belongs to:
# the run's own, by its label.
set -u
# A unit of root's has no HOME, which gcloud looks into, and gcloud is a snap on some images.
export HOME=${HOME:-/root} PATH=$PATH:/snap/bin
name=@NAME@ run_id=@RUN_ID@ warning=@WARNING@ place=(--project=@PROJECT@ --zone=@ZONE@)
# Seconds: that the slice may be up, without a trainer at work, for a save at its end, between looks.
max_seconds=@MAX_SECONDS@ max_hours=@MAX_HOURS@ idle_seconds=${WATCHDOG_IDLE_SECONDS:-3600} save_seconds=${WATCHDOG_SAVE_SECONDS:-240}
look_seconds=${WATCHDOG_LOOK_SECONDS:-60}
# This script is kept in memory, so that a full disk does not end it.
state=${WATCHDOG_STATE:-/var/lib/tpu-pod} script=${WATCHDOG_STATE:-/run/tpu-pod}/watchdog.sh homes=${WATCHDOG_HOMES:-/home}

say() { printf 'watchdog: %s\n' "$*"; }

# To whoever looks at the run, too: status reads it.
warn() {
  say "$1"
  printf '%s\n' "$1" | timeout 120 gcloud storage cp --quiet - "$warning" 2>/dev/null || say "and the bucket cannot be told"
}

# At boot, long before it has to: nothing has the name that is asked for, and the role is looked at before that.
may_delete() {
  local said
  said=$(timeout 120 gcloud compute tpus queued-resources delete "$name-$run_id" "${place[@]}" --quiet 2>&1)
  [[ $said != *PERMISSION_DENIED* && $said != *"ermission '"* ]] ||
    warn "THIS SLICE CANNOT DELETE ITSELF: its service account needs the role TPU Admin. When nobody watches it, it bills until somebody deletes it"
}

# Seconds since the boot. The date is not asked for: it may be wrong, and be set at any time.
now() { cut -d . -f 1 /proc/uptime; }

# How long the slice was up before this boot too, as far as that could be kept, and when a beat was last another one.
up=0 looked=$(now) heard=$looked beats=''
look() {
  local at kept last=$beats
  at=$(now) kept=$(cat "$state/up" 2>/dev/null)
  if [[ $kept =~ ^[0-9]{1,9}$ ]] && [ "$kept" -gt "$up" ]; then up=$kept; fi
  up=$((up + at - looked)) looked=$at
  { mkdir -p "$state" && printf '%s\n' "$up" >"$state/up.new" && mv "$state/up.new" "$state/up"; } 2>/dev/null
  beats=$(stat -c %y "$homes"/*/runs/"$name"/beat 2>/dev/null)
  [ "$beats" = "$last" ] || heard=$at
}

# A later submit may have given the run more hours, or fewer.
may_be_up() {
  local run newest='' hours=''
  for run in "$homes"/*/runs/"$name"/run; do
    if [ -e "$run" ] && { [ -z "$newest" ] || [ "$run" -nt "$newest" ]; }; then newest=$run; fi
  done
  [ -z "$newest" ] || hours=$(sed -n 's/^MAX_HOURS=\([1-9][0-9]*\)$/\1/p' "$newest" 2>/dev/null | head -n 1)
  printf '%s\n' $((max_seconds + (${hours:-$max_hours} - max_hours) * 3600))
}

why() {
  if [ "$up" -ge "$(may_be_up)" ]; then
    printf 'the hours of the run are used up'
  elif [ $((looked - heard)) -ge "$idle_seconds" ]; then
    printf 'no trainer was at work for %s s' "$idle_seconds"
  fi
}

delete() {
  local label
  label=$(timeout 120 gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    '--format=value(tpu.nodeSpec[0].node.labels.run-id)') || return 1
  if [ "$label" != "$run_id" ]; then
    say "the request $name is not this run's; leaving it alone"
    return
  fi
  timeout 600 gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet --async
}

watch() {
  local reason
  may_delete
  while :; do
    look
    reason=$(why)
    if [ -n "$reason" ]; then
      say "$reason; deleting the slice"
      timeout "$save_seconds" systemctl stop "trainer-$name"
      delete || warn "THIS SLICE BILLS FOR NOTHING ($reason) and could not delete itself: it may need the role TPU Admin; trying again. launch/tpu_pod.sh delete ends it"
    fi
    sleep "$look_seconds"
  done
}

case ${1:-start} in
  watch) watch ;;
  *)
    install -D -m 700 "$0" "$script"
    systemd-run --quiet --collect --unit=tpu-pod-watchdog --property=Restart=always --property=RestartSec=60 \
      bash "$script" watch
    ;;
esac
