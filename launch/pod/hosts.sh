# shellcheck shell=bash
# The hosts of a slice, over ssh: one connection each, since gcloud mixes the output of several.

# host_command HOST VERB: sets SSH, the call that lets launch/host.sh do VERB (setup, start, stop) on a host.
# What is in the remote command was checked against patterns that hold no character of the shell.
host_command() {
  local host=$1 verb=$2 command
  local home="runs/$NAME" code="runs/$NAME/code-$TREE"
  case $verb in
    setup)
      command="mkdir -p $code && gcloud storage cp --quiet $RUN_URL/code/$TREE.tar.gz $home/code.tar.gz && \
tar -xzf $home/code.tar.gz -C $code && \
bash $code/launch/host.sh setup $NAME $RUN_URL $TREE $ATTEMPT $host"
      ;;
    start) command="bash $code/launch/host.sh start $NAME" ;;
    stop) command="bash runs/$NAME/current/launch/host.sh stop $NAME" ;;
  esac
  SSH=(compute tpus tpu-vm ssh "$(node_name $((host / HOSTS)))")
  SSH+=("--project=$PROJECT" "--zone=$ZONE" "--worker=$((host % HOSTS))")
  [ -z "$INTERNAL_IPS" ] || SSH+=(--internal-ip)
  SSH+=("--command=$command" --quiet)
}

# on_all_hosts VERB: at most 16 at once; each host's output is kept in LOCAL/VERB-HOST.log. Fails if one did,
# naming the first.
on_all_hosts() {
  local verb=$1 host running=() failed=''
  for ((host = 0; host < HOSTS * SLICES; host++)); do
    host_command "$host" "$verb"
    (
      gcloud "${SSH[@]}" </dev/null >"$LOCAL/$verb-$host.log" 2>&1 || : >"$TEMPORARY/$verb-$host.failed"
    ) &
    running+=("$!")
    if [ ${#running[@]} -ge 16 ]; then
      wait "${running[0]}"
      running=("${running[@]:1}")
    fi
  done
  [ ${#running[@]} = 0 ] || wait "${running[@]}"
  for ((host = 0; host < HOSTS * SLICES; host++)); do
    if [ -e "$TEMPORARY/$verb-$host.failed" ]; then
      rm -f "$TEMPORARY/$verb-$host.failed"
      [ -n "$failed" ] || failed=$host
    fi
  done
  [ -z "$failed" ] && return
  ERROR=$(tail -n 3 "$LOCAL/$verb-$failed.log")
  say "host $failed: $verb failed, see $LOCAL/$verb-$failed.log: $(reason)"
  return 1
}

# Reads what the workers last wrote of themselves to the bucket. Sets WORKERS, lines of
#   HOST STATE EXIT_CODE RESTARTS LOG_BYTES BEAT DETAIL...
read_workers() {
  WORKERS=''
  [ "$ATTEMPT" -gt 0 ] || return 0
  if ask storage cat "$RUN_URL/attempts/$ATTEMPT/host-*.status"; then
    WORKERS=$(printf '%s\n' "$OUT" | LC_ALL=C tr -d '\000-\010\013-\037\177' | sort -n)
  fi
  [ "$KIND" = ok ] || [ "$KIND" = absent ]
}

# Sets RESULT by WORKERS: finished (host 0 writes the result, so it decides), mistake, out_of_memory, diverged,
# crashed, lost (its peers, again and again) or running; RESULT_DETAIL says which host and why.
judge_workers() {
  local host state code detail
  RESULT=running RESULT_DETAIL=''
  while read -r host state code _ _ _ detail; do
    case $state in
      finished)
        if [ "$host" = 0 ]; then
          RESULT=finished RESULT_DETAIL=''
          return
        fi
        ;;
      mistake | out_of_memory | diverged)
        RESULT=$state RESULT_DETAIL="host $host, exit code $code: $detail"
        ;;
      crashed | lost)
        # Of several hosts the one with the cause counts, not those that lost it.
        if [ "$RESULT" = running ] || [ "$RESULT" = lost ]; then
          RESULT=$state RESULT_DETAIL="host $host, exit code $code: $detail"
        fi
        ;;
    esac
  done <<<"$WORKERS"
}

# follow_log HOST: prints what its log has gained since last time.
follow_log() {
  local bytes
  bytes=$(awk -v host="$1" '$1 == host { print $5 }' <<<"$WORKERS")
  matches "${bytes:-0}" '[0-9]+' && [ "${bytes:-0}" -gt "$LOG_SEEN" ] || return 0
  ask storage cat "--range=$LOG_SEEN-$((bytes - 1))" "$RUN_URL/attempts/$ATTEMPT/host-$1.log" || return 0
  LOG_SEEN=$bytes
  printf '%s\n' "$OUT" | LC_ALL=C tr -d '\000-\010\013-\037\177'
}
