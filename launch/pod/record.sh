# shellcheck shell=bash
# What is remembered of a run, in its folder of the bucket and in a copy on this machine:
#   run           what it is and where: key=value lines, made once
#   trainer.args  the trainer's flags, one a line
#   watch         who is watching it; its generation is the lock
#   events        what happened: seconds since 1970, event, detail; tabs between

RECORD_KEYS='NAME PROJECT ZONE TYPE SLICES TIER BUCKET WORKDIR DATA MAX_ATTEMPTS MAX_HOURS PRICE TREE COMMIT'

write_record() {
  local key
  for key in $RECORD_KEYS; do printf '%s=%s\n' "$key" "${!key}"; done
}

# load_record FILE: sets the variables of RECORD_KEYS. The file is data: nothing of it is executed, and every value
# is one that the options would have allowed.
load_record() {
  local key value pattern
  while IFS='=' read -r key value; do
    case $key in
      NAME) pattern=$NAME_PATTERN ;;
      PROJECT) pattern=$PROJECT_PATTERN ;;
      ZONE) pattern=$ZONE_PATTERN ;;
      BUCKET) pattern=$BUCKET_PATTERN ;;
      WORKDIR | DATA) pattern=$FOLDER_PATTERN ;;
      TYPE) pattern='[a-z0-9]+-[0-9]+' ;;
      TIER) pattern='spot|reserved|on-demand' ;;
      SLICES | MAX_ATTEMPTS | MAX_HOURS) pattern='[1-9][0-9]{0,4}' ;;
      PRICE) pattern="($PRICE_PATTERN)?" ;;
      TREE | COMMIT) pattern='[0-9a-f]{40,64}' ;;
      *) continue ;;
    esac
    matches "$value" "$pattern" || die "the record $1 holds ${key}=${value@Q}, which no submit wrote; delete that file"
    printf -v "$key" '%s' "$value"
  done <"$1"
  RUN_URL=$BUCKET/runs/$NAME
  describe_type "$TYPE" || die "the record $1 names no slice type; delete that file"
}

# The run's record is made once for all machines. A name that is in use elsewhere would mean two slices for one run.
claim_name() {
  local key old
  write_record >"$TEMPORARY/run"
  if put "$TEMPORARY/run" "$RUN_URL/run" --if-generation-match=0; then
    cp "$TEMPORARY/run" "$LOCAL/run"
    return
  fi
  [ "$KIND" = conflict ] || [ "$KIND" = exists ] || stop "cannot write to $RUN_URL: $(reason)"
  fetch "$RUN_URL/run" "$TEMPORARY/old" || stop "cannot read $RUN_URL/run: $(reason)"
  for key in PROJECT ZONE TYPE SLICES; do
    old=$(sed -n "s/^$key=//p" "$TEMPORARY/old")
    [ "$old" = "${!key}" ] || old_place_is_empty "$key" "$old"
  done
  put_surely "$TEMPORARY/run" "$RUN_URL/run" || stop "cannot write to $RUN_URL: $(reason)"
  cp "$TEMPORARY/run" "$LOCAL/run"
}

# A run may move to another slice, since its checkpoints fit any; but only when the old slice is surely gone.
old_place_is_empty() {
  local project zone
  project=$(sed -n 's/^PROJECT=//p' "$TEMPORARY/old") zone=$(sed -n 's/^ZONE=//p' "$TEMPORARY/old")
  matches "$project $zone" '[a-z0-9.:-]+ [a-z0-9-]+' || stop "$RUN_URL/run is damaged; choose another --name"
  ask compute tpus queued-resources describe "$NAME" "--project=$project" "--zone=$zone" '--format=value(state.state)' ||
    [ "$KIND" = absent ] || stop "cannot tell whether the run's slice in $zone is gone: $(reason)"
  [ "$KIND" = absent ] ||
    die "run $NAME has a slice ($OUT) with $1=$(printable "$2") in $zone; launch/tpu_pod.sh delete --name $NAME first, or choose another --name"
}

# Takes the run's lock; refuses while somebody else may be watching.
take_lock() {
  local holder host pid
  LOCK_GENERATION=0
  if ask storage objects describe "$RUN_URL/watch" '--format=value(generation)'; then
    LOCK_GENERATION=$OUT
    ask storage cat "$RUN_URL/watch" || stop "cannot read $RUN_URL/watch: $(reason)"
    read -r holder host pid _ <<<"$(printable "$OUT")" || true
    if [ "$holder" = watched ] && ! { [ "$host" = "$(uname -n)" ] && [ -n "$pid" ] && ! is_watcher "$pid"; }; then
      [ -n "$TAKE_OVER" ] ||
        die "run $NAME is being watched by process $pid on $host; if that is gone, add --take-over"
    fi
  elif [ "$KIND" != absent ]; then
    stop "cannot read $RUN_URL/watch: $(reason)"
  fi
  write_lock "watched $(uname -n) $$ $(date +%s)" || die "another submit of $NAME was quicker; see launch/tpu_pod.sh status --name $NAME"
}

# write_lock TEXT: fails if somebody wrote since we last did. An error may come after the write, so look.
write_lock() {
  printf '%s\n' "$1" >"$TEMPORARY/watch"
  if ! put "$TEMPORARY/watch" "$RUN_URL/watch" "--if-generation-match=$LOCK_GENERATION"; then
    ask storage cat "$RUN_URL/watch" && [ "$OUT" = "$1" ] || return 1
  fi
  ask storage objects describe "$RUN_URL/watch" '--format=value(generation)' || stop "cannot read $RUN_URL/watch: $(reason)"
  LOCK_GENERATION=$OUT
}

# Whether the lock is still ours, asked before every change: a stop, a delete or a take-over writes to it.
holds_lock() {
  ask storage objects describe "$RUN_URL/watch" '--format=value(generation)' || return 2
  [ "$OUT" = "$LOCK_GENERATION" ]
}

is_watcher() {
  [[ $1 =~ ^[0-9]+$ ]] && [ "$1" != $$ ] && ps -o args= -p "$1" 2>/dev/null | grep -q tpu_pod
}

# The history: the bucket's copy counts, since the last watcher may have been on another machine.
load_events() {
  if ! fetch "$RUN_URL/events" "$LOCAL/events"; then
    [ "$KIND" = absent ] || stop "cannot read $RUN_URL/events: $(reason)"
    : >"$LOCAL/events"
  fi
  ATTEMPT=$(count_attempts)
}

count_attempts() {
  awk -F '\t' '$2 == "attempt" { n = $3 } END { print n + 0 }' "$LOCAL/events"
}

last_event() {
  awk -F '\t' '{ e = $2 } END { print e }' "$LOCAL/events"
}

# event NAME [DETAIL]: on the terminal, in the local copy and in the bucket. Fails if the bucket has not got it.
event() {
  say "$1${2:+ $2}"
  printf '%s\t%s\t%s\n' "$(date +%s)" "$1" "${2:-}" >>"$LOCAL/events"
  put_surely "$LOCAL/events" "$RUN_URL/events"
}

# Seconds that slices were up, by the events ready and gone. Without gone the last one still is.
billed_seconds() {
  awk -F '\t' -v now="$(date +%s)" '
    $2 == "ready" && !up { up = $1 }
    $2 == "gone" && up { sum += $1 - up; up = 0 }
    END { print sum + (up ? now - up : 0) }' "$LOCAL/events"
}

slice_is_up() {
  awk -F '\t' '$2 == "ready" { up = 1 } $2 == "gone" { up = 0 } END { exit !up }' "$LOCAL/events"
}
