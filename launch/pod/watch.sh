# shellcheck shell=bash
# The loop that brings a run to its end. It keeps no state of its own: each round looks at the bucket and at the
# service and does the one next thing, so that it can be killed anywhere and started again.

watch_run() {
  LOG_SEEN=0 SET_UP='' TRIED='' GRANTED='' UNREADY_SINCE='' SETUP_TRIES=0 LOOKS_GONE=0 REFUSALS=0
  WORKERS='' BEATS='' BEATS_SINCE=0 QUEUE=UNKNOWN SHOWN=''
  while :; do
    still_ours
    queue_state
    # A slice under this name that no attempt of this run made is somebody else's.
    if [ "$ATTEMPT" = 0 ] && [ "$QUEUE" != ABSENT ] && [ "$QUEUE" != UNKNOWN ]; then
      write_lock failed || true
      die "a queued resource $NAME exists in $ZONE that this run did not make; choose another --name, or delete it"
    fi
    if [ "$QUEUE" != "$SHOWN" ]; then
      say "slice $NAME: $QUEUE"
      SHOWN=$QUEUE
    fi
    if read_workers; then judge_workers; else RESULT=unknown; fi
    if [ "$RESULT" = finished ] && [ "$ATTEMPT" != "$OLD_ATTEMPT" ]; then finish_run; fi
    [ "$QUEUE" = ABSENT ] || judge_failure
    case $QUEUE in
      ABSENT) next_attempt ;;
      PROVISIONING) wait_for_slice ;;
      ACTIVE) tend_slice ;;
      SUSPENDED | FAILED) replace_slice ;;
      UNKNOWN) say "$QUEUE_TROUBLE" ;;
        # CREATING, ACCEPTED and WAITING_FOR_RESOURCES do not bill; SUSPENDING and DELETING end by themselves.
    esac
    pause "$POLL_SECONDS"
  done
}

# What no new slice cures, and the limits. A slice that is gone has been judged before.
judge_failure() {
  case $RESULT in
    mistake) give_up "a mistake in the config, the command or the data; no retry cures it ($RESULT_DETAIL)" ;;
    out_of_memory) give_up "out of memory: the model does not fit; no retry cures it ($RESULT_DETAIL)" ;;
    diverged) give_up "the training diverged, again after a rollback; no retry cures it ($RESULT_DETAIL)" ;;
    crashed) give_up "the trainer crashed again and again ($RESULT_DETAIL)" ;;
  esac
  hours_are_left || give_up "$NO_HOURS"
}

hours_are_left() {
  NO_HOURS="slices were up for $MAX_HOURS hours in all; submit again with a higher --max-hours"
  [ "$(billed_seconds)" -lt $((MAX_HOURS * 3600)) ]
}

# A stop, a delete or another watcher wrote to the lock: then this one ends, and changes nothing.
still_ours() {
  local code
  while :; do
    code=0
    holds_lock || code=$?
    [ "$code" != 0 ] || return 0
    [ "$code" = 2 ] || break
    if [ "$KIND" = auth ]; then say "$LOGIN_EXPIRED"; else say "cannot reach the bucket: $(reason)"; fi
    pause "$POLL_SECONDS"
  done
  ask storage cat "$RUN_URL/watch" || OUT='somebody else has it'
  say "this watcher ends: $(printable "$OUT")"
  exit 0
}

next_attempt() {
  local refusal
  if slice_is_up; then event gone || true; fi
  if [ -n "$TRIED" ] && [ -z "$WATCH" ]; then
    write_lock ended || true
    say "the slice is gone and does not bill; the same submit goes on from the last checkpoint, with --watch by itself"
    exit 75
  fi
  SET_UP='' LOG_SEEN=0 UNREADY_SINCE='' BEATS='' GRANTED='' SETUP_TRIES=0 LOOKS_GONE=0
  # A create that failed for the moment is the same attempt still; it is tried at longer and longer intervals.
  for ((refusal = 0; refusal < REFUSALS && refusal < 20; refusal++)); do pause "$POLL_SECONDS"; done
  create_slice
}

# A slice that was granted but does not come up is not waited for endlessly: it may bill.
wait_for_slice() {
  REFUSALS=0 GRANTED=${GRANTED:-$(date +%s)}
  [ $(($(date +%s) - GRANTED)) -lt "$PROVISION_SECONDS" ] || drop_slice "not up after $PROVISION_SECONDS s"
}

replace_slice() {
  queue_failure
  if [ "$FAILURE_KIND" = never ]; then give_up "the slice was refused: $FAILURE"; fi
  if [ "$QUEUE" = FAILED ] && [ -n "$VALID_UNTIL" ] && [ -z "$GRANTED" ] && ! slice_is_up; then
    give_up "no slice within $VALID_UNTIL ($FAILURE)"
  fi
  drop_slice "$QUEUE${FAILURE:+: $FAILURE}"
}

# Preempted, failed, hung: the request holds quota and blocks the name until it is deleted.
drop_slice() {
  still_ours
  event dropped "attempt $ATTEMPT: ${1//$'\t'/ }" || true
  delete_slice || return 0
  QUEUE=ABSENT SHOWN=''
}

# The slice is there: set up once, then watched through its nodes and through what its workers write.
tend_slice() {
  REFUSALS=0 GRANTED=${GRANTED:-$(date +%s)}
  nodes_state
  # A node may not be found right after ACTIVE, so it is gone when two looks say so.
  if [ "$NODES" = gone ]; then LOOKS_GONE=$((LOOKS_GONE + 1)); else LOOKS_GONE=0; fi
  case $NODES in
    ready) UNREADY_SINCE='' ;;
    unknown) say "cannot see $NODE_DETAIL" ;;
    gone) [ "$LOOKS_GONE" -lt 2 ] || drop_slice "$NODE_DETAIL" ;;
    wait)
      UNREADY_SINCE=${UNREADY_SINCE:-$(date +%s)} BEATS_SINCE=$(date +%s)
      [ $(($(date +%s) - UNREADY_SINCE)) -lt "$REPAIR_SECONDS" ] || drop_slice "$NODE_DETAIL for $REPAIR_SECONDS s"
      ;;
  esac
  [ "$NODES" = ready ] || return 0
  if ! slice_is_up; then event ready || true; fi
  if [ -z "$SET_UP" ]; then
    set_up_hosts
  elif [ "$RESULT" = lost ]; then
    drop_slice "hosts keep losing each other ($RESULT_DETAIL)"
  else
    follow_log 0
    watch_beats
  fi
}

set_up_hosts() {
  still_ours
  say "setting up $((HOSTS * SLICES)) hosts"
  if on_all_hosts setup && on_all_hosts start; then
    event started "attempt $ATTEMPT" || true
    SET_UP=1 TRIED=1 BEATS='' BEATS_SINCE=$(date +%s)
    return
  fi
  SETUP_TRIES=$((SETUP_TRIES + 1))
  [ "$SETUP_TRIES" -lt 5 ] || drop_slice "its hosts could not be set up"
}

# A worker that writes nothing for long, or was told to stop by its machine, has a node that only looks well.
watch_beats() {
  if all_beat; then
    BEATS=$WORKERS BEATS_SINCE=$(date +%s)
  elif [ $(($(date +%s) - BEATS_SINCE)) -ge "$SILENT_SECONDS" ]; then
    drop_slice "a host is silent for $SILENT_SECONDS s"
  fi
}

# Whether every host is at work and has written something new since BEATS.
all_beat() {
  printf '%s\n-\n%s\n' "$BEATS" "$WORKERS" | awk -v hosts=$((HOSTS * SLICES)) '
    $0 == "-" { now = 1; next }
    !now { old[$0] = 1; next }
    $2 == "finished" || ($2 == "running" || $2 == "restarting") && !($0 in old) { n++ }
    END { exit n != hosts }'
}

finish_run() {
  follow_log 0
  say "finished; deleting the slice"
  still_ours
  delete_slice || exit 1
  event finished "attempt $ATTEMPT" || true
  write_lock finished || true
  report_result
  exit 0
}

# give_up WHY: the end of the run as far as this can see. Nothing is left that bills; the logs are in the bucket.
give_up() {
  still_ours
  say "stopping: $1"
  # Trainers that still run save first.
  [ "$QUEUE" != ACTIVE ] || on_all_hosts stop || true
  delete_slice || exit 1
  event failed "${1//$'\t'/ }" || true
  write_lock failed || true
  say "nothing bills any more; launch/tpu_pod.sh logs --name $NAME shows the log, submit goes on from the last checkpoint"
  exit 1
}

report_result() {
  local folder=$RUN_URL
  [[ $WORKDIR != gs://* ]] || folder=$WORKDIR
  if ask storage cat "$folder/result.json"; then printf '%s\n' "$OUT" | LC_ALL=C tr -d '\000-\010\013-\037\177'; fi
  say "the checkpoints are in $WORKDIR"
}
