# shellcheck shell=bash
# The queued resource: one per run, under the run's name, which is what makes creating it idempotent.

LOGIN_EXPIRED="gcloud's login has expired; run gcloud auth login. The slice is left as it is (and bills if it is up); \
this goes on by itself"

create_command() {
  CREATE=(compute tpus queued-resources create "$NAME" "--project=$PROJECT" "--zone=$ZONE"
    "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME" "--labels=run=$NAME")
  if [ "$SLICES" = 1 ]; then
    CREATE+=("--node-id=$NAME")
  else
    CREATE+=("--node-count=$SLICES" "--node-prefix=$NAME")
  fi
  [ "$TIER" = on-demand ] || CREATE+=("--$TIER")
  [ -z "$VALID_UNTIL" ] || CREATE+=("--valid-until-duration=$VALID_UNTIL")
  [ -z "$NETWORK" ] || CREATE+=("--network=$NETWORK")
  [ -z "$SUBNETWORK" ] || CREATE+=("--subnetwork=$SUBNETWORK")
  [ -z "$SERVICE_ACCOUNT" ] || CREATE+=("--service-account=$SERVICE_ACCOUNT")
  [ -z "$INTERNAL_IPS" ] || CREATE+=(--internal-ips)
  CREATE+=(--quiet)
}

describe_command() {
  DESCRIBE=(compute tpus queued-resources describe "$NAME" "--project=$PROJECT" "--zone=$ZONE")
}

delete_command() {
  DELETE=(compute tpus queued-resources delete "$NAME" "--project=$PROJECT" "--zone=$ZONE" --force --quiet)
}

# Sets QUEUE: the state, ABSENT only on an explicit "not found", else UNKNOWN with the reason in QUEUE_TROUBLE.
queue_state() {
  describe_command
  QUEUE_TROUBLE=''
  if ask "${DESCRIBE[@]}" '--format=value(state.state)'; then
    QUEUE=${OUT:-UNKNOWN}
  elif [ "$KIND" = absent ]; then
    QUEUE=ABSENT
  else
    QUEUE=UNKNOWN QUEUE_TROUBLE="cannot see the slice: $(reason)"
    [ "$KIND" != auth ] || QUEUE_TROUBLE=$LOGIN_EXPIRED
  fi
}

# Sets FAILURE, the service's own words on why a request failed, and FAILURE_KIND: again or never.
queue_failure() {
  ask "${DESCRIBE[@]}" '--format=value(state.failedData.error.code,state.failedData.error.message)' || OUT=''
  FAILURE=$(printf '%s' "$OUT" | LC_ALL=C tr '\t\n' '  ' | LC_ALL=C tr -d '\000-\037\177')
  FAILURE_KIND=again
  case $(classify "$OUT") in
    invalid | no-quota | quota | permission) FAILURE_KIND=never ;;
  esac
  return 0
}

# Creates the slice of a new attempt. Returns 0 also where it is not known whether that worked: the next look tells.
create_slice() {
  still_ours
  if [ "$REFUSALS" = 0 ]; then
    [ "$ATTEMPT" -lt "$MAX_ATTEMPTS" ] || fail "$ATTEMPT attempts are used up; submit again with a higher --max-attempts"
    hours_are_left || fail "$NO_HOURS"
    # Written before, so that an attempt whose creation was cut short is found again.
    event attempt "$((ATTEMPT + 1))" || {
      say "cannot write the run's history, so nothing is created: $(reason)"
      return 0
    }
    ATTEMPT=$((ATTEMPT + 1))
  fi
  create_command
  if call "${CREATE[@]}"; then
    say "asked for $SLICES x $TYPE in $ZONE ($TIER)"
    REFUSALS=0
    return
  fi
  REFUSALS=$((REFUSALS + 1))
  case $KIND in
    exists) say "the slice is there already" ;;
    network | rate | capacity) say "cannot tell or not now, will look again: $(reason)" ;;
    auth) say "$LOGIN_EXPIRED" ;;
    quota) fail "quota: $(reason); delete other slices or ask for more quota, then submit again" ;;
    no-quota) fail "no quota at all of this kind in $ZONE: $(reason); another zone or tier, or ask for quota" ;;
    permission) fail "not allowed: $(reason); you need the role TPU Admin in $PROJECT" ;;
    *) fail "refused: $(reason)" ;;
  esac
}

# Deletes the slice and returns when it is surely gone: 1 if that could not be brought about in time.
delete_slice() {
  local try
  delete_command
  for ((try = 0; try < DELETE_TRIES; try++)); do
    queue_state
    case $QUEUE in
      ABSENT)
        if slice_is_up; then event gone || true; fi
        return 0
        ;;
      DELETING) ;;
      *) call "${DELETE[@]}" || [ "$KIND" = absent ] || say "deleting failed, trying again: $(reason)" ;;
    esac
    # The first look is right after the delete, which has waited for the operation.
    [ "$try" = 0 ] || pause "$POLL_SECONDS"
  done
  say "$NAME IS NOT KNOWN TO BE GONE AND MAY STILL BILL; run launch/tpu_pod.sh delete --name $NAME"
  return 1
}

# Looks at every node. Sets NODES: ready, wait (coming up or under repair), gone or unknown, and NODE_DETAIL.
nodes_state() {
  local slice node state health
  NODES=ready NODE_DETAIL=''
  for ((slice = 0; slice < SLICES; slice++)); do
    node=$(node_name "$slice")
    if ! ask compute tpus tpu-vm describe "$node" "--project=$PROJECT" "--zone=$ZONE" '--format=csv[no-heading](state,health)'; then
      NODE_DETAIL="$node: $KIND"
      # Right after ACTIVE a node may not be found yet; the caller waits for a second look.
      if [ "$KIND" = absent ]; then NODES=gone; else NODES=unknown; fi
      return
    fi
    IFS=, read -r state health <<<"$OUT"
    case $state in
      READY) [ "$health" != UNHEALTHY_MAINTENANCE ] && [ "$health" != TIMEOUT ] && continue ;;
      CREATING | STARTING | RESTARTING | REPAIRING | REIMAGING | UNKNOWN | '') ;;
      *)
        NODES=gone NODE_DETAIL="$node is $state"
        return
        ;;
    esac
    NODES=wait NODE_DETAIL="$node is $state${health:+, $health}"
  done
}
