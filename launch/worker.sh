#!/usr/bin/env bash
# One on each host, under systemd: starts the trainer, restarts it where that helps, passes signals on at once, and
# writes the log and a line about itself to the bucket.
#   worker.sh HOME    the folder that launch/host.sh set up
#
# The line, in attempts/N/host-I.status: HOST STATE EXIT_CODE RESTARTS LOG_BYTES BEAT DETAIL, of which LOG_BYTES are
# those that were sent. States: running, restarting, stopped (told to), and for good: finished, mistake, out_of_memory,
# diverged, corrupt (a chip), crashed, lost (its peers).
# The log, in attempts/N/logs/host-I: parts, each named by its first byte. What was sent is taken off the disk.
set -uo pipefail

home=$1
host=$(<"$home/host") attempt=$(<"$home/attempt") url=$(<"$home/url")
log=$home/log status=$home/status code=- restarts=0 state=running detail=''
value_of() { sed -n "s/^$1=//p" "$home/run"; }
workdir=$(value_of WORKDIR) data=$(value_of DATA)
# Seconds: before the first restart (doubled each time), between writes to the bucket, for a save after SIGTERM, from
# a second SIGTERM to SIGKILL, that a trainer must live for its earlier failures to be forgotten, before a slice that
# is done deletes itself.
backoff=${WORKER_BACKOFF_SECONDS:-15} beat_seconds=${WORKER_BEAT_SECONDS:-60} save_seconds=${WORKER_SAVE_SECONDS:-150}
kill_seconds=${WORKER_KILL_SECONDS:-10} healthy_seconds=${WORKER_HEALTHY_SECONDS:-900} idle_seconds=${WORKER_IDLE_SECONDS:-1800}
# Bytes: of a part of the log, of what was sent and stays on the disk, of what may wait for the bucket.
part_bytes=${WORKER_PART_BYTES:-1048576} kept_bytes=${WORKER_KEPT_BYTES:-67108864} unsent_bytes=${WORKER_UNSENT_BYTES:-1073741824}
max_crashes=5 max_losses=20
arguments=() environment=()
trainer='' stop_why='' shipper='' killer='' signalled=''

say() { printf 'worker: %s\n' "$*" >>"$log"; }

# The line is on disk first: a worker that comes back after a reboot must know how it ended.
write_status() {
  detail=$(printf '%.300s' "$detail" | LC_ALL=C tr -c ' -~' ' ')
  printf '%s %s %s %s %s\n' "$host" "$state" "$code" "$restarts" "$detail" >"$status.new"
  mv "$status.new" "$status"
}

# Sends what the log has gained, at most so many parts. What the bucket has, and where the part ends that is on its way,
# is on disk first: a sender that was ended in the middle and the next one send the same bytes under the same name.
ship_log() {
  local count sent end part=$home/log.part.$BASHPID # its own: what an ended one has started may be at work still
  # A hole instead of a second file, since the trainer goes on writing to this one.
  read -r sent end <"$home/sent"
  [ "$sent" -le "$kept_bytes" ] || fallocate --punch-hole --offset 0 --length "$((sent - kept_bytes))" "$log" 2>/dev/null
  for ((count = 0; count < $1; count++)); do
    if [ "$end" = "$sent" ]; then
      sent=$(not_dropped "$sent") end=$(next_part "$sent")
      [ "$end" -gt "$sent" ] || return 0
      remember_sent "$sent" "$end" || return
    fi
    bytes_of_log "$sent" "$((end - sent))" >"$part"
    [ "$(stat -c %s "$part")" = "$((end - sent))" ] || return # the disk is full
    timeout 120 gcloud storage cp --quiet "$part" "$url/attempts/$attempt/logs/host-$host/$(printf %015d "$sent")" \
      >/dev/null 2>&1 && remember_sent "$end" "$end" || return
    sent=$end
  done
}

bytes_of_log() { tail -c "+$(($1 + 1))" "$log" | head -c "$2"; }

# On a full disk the old words stay.
remember_sent() { printf '%s %s\n' "$1" "$2" >"$home/sent.new" && mv "$home/sent.new" "$home/sent"; }

# A bucket that took nothing for long does not fill the disk.
not_dropped() {
  local oldest=$(($(stat -c %s "$log") - unsent_bytes))
  if [ "$oldest" -gt "$1" ]; then
    say "$((oldest - $1)) bytes of the log are dropped, since the bucket took nothing"
  else
    oldest=$1
  fi
  printf '%s\n' "$oldest"
}

# Where the next part ends: with a whole line, unless one is longer than a part. Uses the file of ship_log.
next_part() {
  local bytes rest=0
  bytes_of_log "$1" "$part_bytes" >"$part"
  bytes=$(wc -c <"$part")
  [ "$(tail -c 1 "$part" | wc -l)" -gt 0 ] || rest=$(tail -n 1 "$part" | wc -c)
  [ "$rest" -lt "$bytes" ] || rest=0
  printf '%s\n' "$(($1 + bytes - rest))"
}

# Never fails: without the bucket for a while the training goes on.
ship() {
  local sent line
  ship_log "$1" || ship_log "$1" # after a worker's end there may be no other time
  rm -f "$home/log.part.$BASHPID"
  read -r sent _ <"$home/sent"
  read -r -a line <"$status" # the sender that is being replaced must not send a new state with old words
  printf '%s %s %s %s\n' "${line[*]:0:4}" "$sent" "$(date +%s)" "${line[*]:4}" >"$status.sent"
  timeout 120 gcloud storage cp --quiet "$status.sent" "$url/attempts/$attempt/host-$host.status" >/dev/null 2>&1
  # A workdir on the hosts is not seen from outside; these two files are what status and the watcher need of it.
  if [ "$host" = 0 ] && [[ $workdir != gs://* ]]; then
    for file in goodput.json result.json; do
      [ ! -f "$workdir/$file" ] || timeout 120 gcloud storage cp --quiet "$workdir/$file" "$url/$file" >/dev/null 2>&1
    done
  fi
  return 0
}

# Sends what there is now, and from then on now and again: one sender at a time.
report() {
  write_status
  if [ -n "$shipper" ]; then
    kill "$shipper" 2>/dev/null
    wait "$shipper" 2>/dev/null
  fi
  shipper=''
  case $state in
    running | restarting)
      (
        trap - TERM INT USR1
        while :; do
          # The slice's watchdog (launch/pod/watchdog.sh) deletes a slice on which this stands still.
          touch "$home/beat"
          ship 16 # a log that pours must not keep the line back
          sleep "$beat_seconds"
        done
      ) &
      shipper=$!
      ;;
    *)
      # A machine that goes away, and a slice that bills until this line is read, wait for the end of the log alone.
      [ "$unsent_bytes" -lt $((32 * part_bytes)) ] || unsent_bytes=$((32 * part_bytes))
      ship 40
      ;;
  esac
}

# At SIGTERM the trainer saves and leaves with 75, on all hosts. A second one would end it unsaved, and preemption is
# told in two ways at once, so it is passed on once. A trainer that hangs is told again after a while, then killed.
pass_on() {
  signalled=1
  # To be stopped outweighs maintenance, after which the trainer would be started again.
  [ "$stop_why" = stop ] || stop_why=$1
  say "$1"
  [ -n "$trainer" ] && [ -z "$killer" ] || return 0
  kill -TERM "$trainer" 2>/dev/null
  (
    trap - TERM INT USR1
    sleep "$save_seconds"
    kill -TERM "$trainer"
    sleep "$kill_seconds"
    kill -KILL -- "-$trainer"
  ) 2>/dev/null &
  killer=$!
}

# Maintenance is announced by the machine's metadata, which answers when the value changes. Only 200 means anything.
watch_metadata() {
  local value
  while :; do
    value=$(curl -sf -H 'Metadata-Flavor: Google' \
      "http://metadata.google.internal/computeMetadata/v1/instance/$1?wait_for_change=true") || {
      sleep 10
      continue
    }
    case $value in
      TRUE | *_ON_HOST_MAINTENANCE) kill -USR1 $$ ;;
    esac
  done
}

mount_data() {
  local bucket folder only=()
  [[ $data == gs://* ]] || return 0
  mkdir -p "$home/data"
  if mount_is_good; then return; fi
  # Left by a gcsfuse that died: detach it, and never delete what is below a mount point.
  fusermount -u "$home/data" 2>/dev/null
  bucket=${data#gs://} folder=${bucket#*/}
  [ "$folder" = "$bucket" ] || only=("--only-dir=$folder")
  # The values and their reasons are in docs/data.md.
  gcsfuse -o ro --implicit-dirs --metadata-cache-ttl-secs=-1 --stat-cache-max-size-mb=-1 \
    --kernel-list-cache-ttl-secs=-1 "${only[@]}" "${bucket%%/*}" "$home/data" >>"$log" 2>&1 &&
    ls -R "$home/data" >/dev/null && mount_is_good
}

mount_is_good() { [ -r "$home/data/manifest.json" ]; }

# A trainer that has just died can hold the chips for some seconds; the next one would fail on them.
wait_for_chips() {
  local try
  for ((try = 0; try < 60; try++)); do
    # shellcheck disable=SC2010 # of /proc, whose names are numbers
    ls -l /proc/[0-9]*/fd 2>/dev/null | grep -Eq '/dev/(accel|vfio/)[0-9]' || return 0
    sleep 1
  done
  say "something still holds the TPU chips; starting all the same"
}

# What the trainer is started with: flags, `env NAME=VALUE` and `secret NAME=projects/P/secrets/S/versions/V`. A secret
# is fetched at each start, and is nowhere but in memory.
read_arguments() {
  local line name project secret version value
  arguments=() environment=()
  while IFS= read -r line || [ -n "$line" ]; do
    case $line in
      'env '*) environment+=("${line#env }") ;;
      'secret '*)
        line=${line#secret } name=${line%%=*}
        IFS=/ read -r _ project _ secret _ version <<<"${line#*=}"
        value=$(timeout 120 gcloud secrets versions access "$version" "--secret=$secret" "--project=$project" \
          2>"$home/secret.error" </dev/null) || {
          no_secret "$name" "$secret"
          return 1
        }
        environment+=("$name=$value")
        ;;
      *) arguments+=("$line") ;;
    esac
  done <"$home/trainer.args"
}

# Denied or missing, no retry cures it; everything else may be the network.
no_secret() {
  local error
  error=$(<"$home/secret.error")
  code=1 state=crashed detail="error: secret $1 could not be fetched: $error"
  case $error in
    *PERMISSION_DENIED* | *"ermission '"*)
      code=2 state=mistake detail="error: secret $1 is denied: give the slice's service account the role Secret Manager Secret Accessor on $2"
      ;;
    *NOT_FOUND* | *FAILED_PRECONDITION* | *INVALID_ARGUMENT*) code=2 state=mistake ;;
  esac
}

run_trainer() {
  local path=$data got
  [[ $data != gs://* ]] || path=$home/data
  log_before=$(stat -c %s "$log")
  # In a group of its own, so that its data workers can be ended with it. With tpu,cpu a chip that cannot be
  # opened is an error; JAX would else train on the CPU. The model is this code's, whatever was installed earlier.
  (
    # Not as words of a command, which everybody on the machine could read.
    export "${environment[@]}" "PYTHONPATH=$(pwd -P)/model" "JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}"
    exec setsid "$home/venv/bin/python" -m trainer "${arguments[@]}" "--workdir=$workdir" "--config.data.path=$path"
  ) >>"$log" 2>&1 </dev/null &
  trainer=$! environment=()
  [ -z "$stop_why" ] || pass_on "$stop_why"
  # A trap ends wait early, with the signal's number; then the trainer is waited for again. 127: it was already.
  signalled=1
  while [ -n "$signalled" ]; do
    signalled=''
    wait "$trainer"
    got=$?
    [ "$got" = 127 ] || code=$got
  done
  kill -KILL -- "-$trainer" 2>/dev/null
  trainer=''
  if [ -n "$killer" ]; then kill "$killer" 2>/dev/null; fi
  killer=''
}

# What the exit code means, with the log of this start for the one case that needs it. Sets state and detail.
judge() {
  local output end
  end=$(stat -c %s "$log")
  output=$(bytes_of_log $((end - log_before > 262144 ? end - 262144 : log_before)) 262144 | tail -n 300)
  case $code in
    0) state=finished ;;
    75) state=interrupted ;;
    2) state=mistake ;;
    3) state=out_of_memory ;;
    4) state=diverged ;;
    5) state=corrupt ;;
    70 | 134 | 143) state=lost ;;
    *) if [[ $output == *RESOURCE_EXHAUSTED* ]]; then state=out_of_memory; else state=crashed; fi ;;
  esac
  detail=$(printf '%s\n' "$output" | grep -E '^(error:|[A-Za-z_.]*(Error|Exception):)|RESOURCE_EXHAUSTED' | tail -n 1)
  if [ -z "$detail" ] && [ "$code" -gt 128 ]; then detail="ended by SIG$(kill -l "$code" 2>/dev/null)"; fi
  # The trainer's own words for a disk or bucket that is full are RESOURCE_EXHAUSTED too, and mean something else.
  if [ "$state" = out_of_memory ] && [ "$code" != 3 ] && [[ $detail == *"No space left"* || $detail == *uota* || $detail == *"is full"* ]]; then
    state=crashed
  fi
}

# Only the run's own, by its label: the name may be somebody else's by now.
delete_slice() {
  local request label
  request=("$(value_of NAME)" "--project=$(value_of PROJECT)" "--zone=$(value_of ZONE)")
  label=$(timeout 120 gcloud compute tpus queued-resources describe "${request[@]}" \
    '--format=value(tpu.nodeSpec[0].node.labels.run-id)' 2>>"$log") || return 1
  if [ "$label" != "$(value_of RUN_ID)" ]; then
    say "the request $(value_of NAME) is not this run's; leaving it alone"
    return
  fi
  timeout 600 gcloud compute tpus queued-resources delete "${request[@]}" --force --quiet --async >>"$log" 2>&1
}

# Waits so many seconds, or until it is told to stop. In short sleeps, since a signal that comes just before one is
# answered only after it.
pause() {
  local end=$((SECONDS + $1))
  while [ "$stop_why" != stop ] && [ "$SECONDS" -lt "$end" ]; do
    sleep 1 &
    wait $!
  done
}

# The end of this worker. A slice on which nothing runs deletes itself after a while, should nobody be watching.
leave() {
  say "$state${detail:+: $detail} (exit code $code)"
  report
  [ "$state" != stopped ] || exit 0
  pause "$idle_seconds"
  [ "$stop_why" != stop ] || exit 0
  say "nobody deleted the slice in $idle_seconds s; deleting it"
  delete_slice || say "this machine may not delete its slice: it needs the role TPU Admin"
  ship 16
  exit 0
}

trap 'pass_on stop' TERM INT
trap 'pass_on "maintenance or preemption announced"' USR1
rm -f "$home"/log.part.*
touch "$log"
[ -s "$home/sent" ] || remember_sent 0 0
# A machine that lost its power may have lost the end of the log, too, of which the bucket has more.
truncate --no-create --size=">$(cut -d ' ' -f 2 "$home/sent")" "$log"
if [ -f "$status" ]; then
  read -r _ state code restarts detail <"$status"
  case $state in
    finished | mistake | out_of_memory | diverged | corrupt | crashed | lost) leave ;;
  esac
fi
(
  trap - TERM INT USR1
  watch_metadata preempted
) &
(
  trap - TERM INT USR1
  watch_metadata maintenance-event
) &
trap 'kill $(jobs -p) 2>/dev/null' EXIT

crashes=0 losses=0
while :; do
  state=running detail=''
  say "start $((restarts + 1)) on host $host, attempt $attempt"
  began=$SECONDS
  if ! mount_data; then
    code=1 state=crashed detail="the bucket of $data could not be mounted"
  elif read_arguments; then
    report
    began=$SECONDS
    run_trainer
    judge
  fi
  if [ "$stop_why" = stop ]; then
    case $state in
      finished | mistake | out_of_memory | diverged | corrupt) ;;
      *) state=stopped ;;
    esac
  fi
  if [ $((SECONDS - began)) -ge "$healthy_seconds" ]; then crashes=0 losses=0; fi
  case $state in
    crashed)
      crashes=$((crashes + 1)) failures=$crashes
      [ "$crashes" -lt "$max_crashes" ] || leave
      ;;
    lost)
      losses=$((losses + 1)) failures=$losses
      [ "$losses" -lt "$max_losses" ] || leave
      ;;
    interrupted) failures=1 ;;
    *) leave ;;
  esac
  restarts=$((restarts + 1))
  delay=$((backoff << (failures < 6 ? failures - 1 : 5)))
  say "$state${detail:+: $detail} (exit code $code); starting again in $delay s"
  state=restarting stop_why=''
  report
  pause "$delay"
  [ "$stop_why" != stop ] || {
    state=stopped
    leave
  }
  stop_why=''
  wait_for_chips
done
