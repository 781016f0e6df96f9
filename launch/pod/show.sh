# shellcheck shell=bash
# The commands on a run that exists.

show_status() {
  local host state code restarts detail seconds
  load_events
  queue_state
  echo "run       $NAME: $SLICES x $TYPE ($TIER) in $ZONE, project $PROJECT"
  echo "slice     $QUEUE${QUEUE_TROUBLE:+ ($QUEUE_TROUBLE)}"
  echo "attempts  $ATTEMPT of $MAX_ATTEMPTS"
  if ask storage cat "$RUN_URL/watch"; then echo "watcher   $(printable "$OUT")"; else echo "watcher   none ($KIND)"; fi
  progress
  seconds=$(billed_seconds)
  awk -v s="$seconds" -v chips="$((CHIPS * SLICES))" -v price="$PRICE" \
    -v now="$(if slice_is_up; then echo one is up; else echo none is up now; fi)" 'BEGIN {
    printf "cost      slices were up for %.2f h = %.1f chip-hours", s / 3600, s / 3600 * chips
    if (price != "") printf " = $%.2f at $%s per chip-hour", s / 3600 * chips * price, price
    print ", and " now (price == "" ? "; submit --price USD_PER_CHIP_HOUR to see dollars" : "") }'
  read_workers || echo "workers   cannot be read ($KIND)"
  while read -r host state code restarts _ _ detail; do
    [ -z "$host" ] || echo "host $host    $state, exit code $code, $restarts restarts${detail:+: $detail}"
  done <<<"$WORKERS"
  echo "history"
  tail -n 8 "$LOCAL/events" | while IFS=$'\t' read -r seconds state detail; do
    printf '  %(%Y-%m-%d %H:%M:%S)T  %s %s\n' "$seconds" "$(printable "$state")" "$(printable "$detail")"
  done
}

# Step, loss and goodput, as the trainer last wrote them.
progress() {
  local folder=$RUN_URL key line=''
  [[ $WORKDIR != gs://* ]] || folder=$WORKDIR
  if ask storage cat "$folder/goodput.json"; then
    for key in highest_step loss goodput starts; do
      line+="$key $(printf '%s\n' "$OUT" | sed -n "s/.*\"$key\": *\([0-9.eE+-]*\).*/\1/p" | head -n 1)  "
    done
    echo "progress  ${line/highest_/}"
  else
    echo "progress  nothing yet"
  fi
}

show_logs() {
  local host=${HOST:-0}
  check_host
  load_events
  [ "$ATTEMPT" -gt 0 ] || die "run $NAME has had no slice yet, so there is no log"
  if [ -z "$FOLLOW" ]; then
    ask storage cat "$RUN_URL/attempts/$ATTEMPT/host-$host.log" || die "no log of host $host in attempt $ATTEMPT ($KIND)"
    printf '%s\n' "$OUT" | LC_ALL=C tr -d '\000-\010\013-\037\177'
    return
  fi
  local attempt=''
  while :; do
    load_events
    # Another slice begins another log.
    [ "$ATTEMPT" = "$attempt" ] || LOG_SEEN=0
    attempt=$ATTEMPT
    read_workers
    follow_log "$host"
    pause "$POLL_SECONDS"
  done
}

check_host() {
  local last=$((HOSTS * SLICES - 1))
  if ! matches "${HOST:-0}" '[0-9]{1,4}' || [ "${HOST:-0}" -gt "$last" ]; then
    die "--host=${HOST@Q} is not a host of $SLICES x $TYPE; choose one from 0 to $last"
  fi
}

open_ssh() {
  local host=${HOST:-0}
  check_host
  exec gcloud compute tpus tpu-vm ssh "$(node_name $((host / HOSTS)))" "--project=$PROJECT" "--zone=$ZONE" \
    "--worker=$((host % HOSTS))"
}

# TensorBoard on a copy that is refreshed: works with the bucket alone, and after the slice is gone.
open_tensorboard() {
  [[ $WORKDIR == gs://* ]] || die "the workdir $WORKDIR is on the hosts; run tensorboard --logdir $WORKDIR there"
  "$PYTHON" -c 'import tensorboard' 2>/dev/null || die "$PYTHON has no TensorBoard; run make setup, or set PYTHON"
  mkdir -p "$LOCAL/tensorboard"
  call storage rsync --recursive --quiet "$WORKDIR/tensorboard" "$LOCAL/tensorboard" || die "no events yet: $(reason)"
  (
    trap 'kill $!; exit' TERM
    while pause 60; do call storage rsync --recursive --quiet "$WORKDIR/tensorboard" "$LOCAL/tensorboard"; done
  ) &
  # In the background Ctrl-C is not heard.
  trap 'kill %1; rm -rf "$TEMPORARY"' EXIT
  "$PYTHON" -m tensorboard.main --logdir "$LOCAL/tensorboard"
}

# Ends the watcher first, which would otherwise make a new slice.
seize_lock() {
  LOCK_GENERATION=0
  if ask storage objects describe "$RUN_URL/watch" '--format=value(generation)'; then
    LOCK_GENERATION=$OUT
  elif [ "$KIND" != absent ]; then
    stop "cannot reach $RUN_URL: $(reason)"
  fi
  write_lock "$1 by $(id -un) on $(uname -n)" || stop "somebody else changed the run at the same time; try again"
  load_events
}

stop_run() {
  seize_lock stopped
  queue_state
  [ "$QUEUE" = ACTIVE ] || die "run $NAME has no slice that is up ($QUEUE); delete removes what is queued"
  on_all_hosts stop || stop "not every host stopped; delete ends the billing all the same"
  event stopped
  say "saved and stopped. THE SLICE IS UP AND BILLS: submit goes on with it, delete ends it"
}

delete_run() {
  local answer
  if [ -z "$YES" ]; then
    read -r -p "delete the slice of run $NAME ($SLICES x $TYPE in $ZONE)? The checkpoints stay. [y/N] " answer || answer=''
    [ "$answer" = y ] || [ "$answer" = Y ] || die "nothing was deleted; answer y, or give --yes"
  fi
  seize_lock deleted
  queue_state
  # The trainers save first; whether that works or not, the slice goes.
  [ "$QUEUE" != ACTIVE ] || on_all_hosts stop || true
  delete_slice || exit 1
  event deleted || true
  say "the slice is gone, nothing bills; the run is kept in $RUN_URL"
}

list_runs() {
  local record none=1
  # Of this machine; the bucket knows the others.
  for record in "$STATE"/runs/*/run; do
    [ -f "$record" ] || continue
    none=''
    load_record "$record"
    queue_state
    printf '%-24s %s x %-12s %-16s %s\n' "$NAME" "$SLICES" "$TYPE" "$ZONE" "$QUEUE"
  done
  [ -z "$none" ] || echo "no run was submitted from this machine"
}
