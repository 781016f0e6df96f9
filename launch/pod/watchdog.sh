#!/usr/bin/env bash
# The startup script of every host of a slice, which launch/pod fills in between the @s. It needs no set-up: should nobody
# watch, the slice is deleted when no trainer has been at work for an hour, or when its hours are used up. It runs at
# every boot, as root; the loop goes on in a unit of its own.
#
# The worker touches ~/runs/NAME/beat while a trainer runs. What it deletes is the request that this machine belongs to:
# the run's own, by its label.
set -u
name=@NAME@ run_id=@RUN_ID@ place=(--project=@PROJECT@ --zone=@ZONE@)
# Seconds: that the slice may be up, without a trainer at work, for a save at its end, between looks.
max_seconds=@MAX_SECONDS@ max_hours=@MAX_HOURS@ idle_seconds=${WATCHDOG_IDLE_SECONDS:-3600} save_seconds=${WATCHDOG_SAVE_SECONDS:-240}
look_seconds=${WATCHDOG_LOOK_SECONDS:-60}
state=${WATCHDOG_STATE:-/var/lib/tpu-pod} homes=${WATCHDOG_HOMES:-/home}

say() { printf 'watchdog: %s\n' "$*"; }

# What is left of the hours is counted from the first boot, idle time from the last one.
now() { date +%s; }
up=$(cut -d . -f 1 /proc/uptime)
mkdir -p "$state"
[ -s "$state/born" ] || now >"$state/born"
booted=${WATCHDOG_BOOTED:-$(($(now) - up))}

last_beat() {
  local newest=$booted beat
  for beat in "$homes"/*/runs/"$name"/beat; do
    [ -e "$beat" ] || continue
    beat=$(date -r "$beat" +%s)
    # A clock that was set meanwhile does not keep the slice.
    if [ "$beat" -gt "$newest" ] && [ "$beat" -le "$(now)" ]; then newest=$beat; fi
  done
  printf '%s\n' "$newest"
}

# A later submit may have given the run more hours, or fewer.
may_be_up() {
  local hours
  hours=$(sed -n 's/^MAX_HOURS=\([1-9][0-9]*\)$/\1/p' "$homes"/*/runs/"$name"/run 2>/dev/null | head -n 1)
  printf '%s\n' $((max_seconds + (${hours:-$max_hours} - max_hours) * 3600))
}

why() {
  if [ $(($(now) - $(<"$state/born"))) -ge "$(may_be_up)" ]; then
    printf 'the hours of the run are used up'
  elif [ $(($(now) - $(last_beat))) -ge "$idle_seconds" ]; then
    printf 'no trainer was at work for %s s' "$idle_seconds"
  fi
}

delete() {
  local label
  label=$(timeout 120 gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    '--format=value(tpu.nodeSpec[0].node.labels.run-id)') || return 1
  if [ "$label" != "$run_id" ]; then
    say "the request $name is not this run's; leaving it alone"
    return 1
  fi
  timeout 600 gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet --async
}

watch() {
  local reason
  while :; do
    reason=$(why)
    if [ -n "$reason" ]; then
      say "$reason; deleting the slice"
      timeout "$save_seconds" systemctl stop "trainer-$name"
      delete || say "this machine could not delete its slice: it needs the role TPU Admin; trying again"
    fi
    sleep "$look_seconds"
  done
}

case ${1:-start} in
  watch) watch ;;
  *)
    install -m 700 "$0" "$state/watchdog.sh"
    systemd-run --quiet --collect --unit=tpu-pod-watchdog --property=Restart=always --property=RestartSec=60 \
      bash "$state/watchdog.sh" watch
    ;;
esac
