# shellcheck shell=bash
# submit: check, record, then watch. Run again it does the same, and finds done what was done.

submit() {
  fill_defaults
  check_options
  LOCAL=$STATE/runs/$NAME
  if [ -n "$DRY_RUN" ]; then
    dry_run
    return
  fi
  check_cloud
  choose_code
  check_config
  mkdir -p "$LOCAL"
  check_plan
  if [ -n "$DETACH" ]; then detach; fi
  trap 'interrupted INT' INT
  trap 'interrupted TERM' TERM
  take_lock
  claim_name
  printf '%s\n' "$NAME" >"$STATE/last"
  load_events
  # What an earlier run of the same flags brought to its end is not done again; other flags ask for more.
  OLD_ATTEMPT=-1
  if [ "$(last_event)" = finished ]; then
    OLD_ATTEMPT=$ATTEMPT
    fetch "$RUN_URL/trainer.args" "$TEMPORARY/old.args" || stop "cannot read $RUN_URL/trainer.args: $(reason)"
    if [ "$(printf '%s\n' "${TRAINER_ARGS[@]}")" = "$(<"$TEMPORARY/old.args")" ]; then
      delete_slice || exit 1
      write_lock finished || true
      say "run $NAME is finished already, and has no slice; for another run choose another --name"
      report_result
      exit 0
    fi
  fi
  upload_code
  event submitted "commit ${COMMIT:0:12}, code ${TREE:0:12}" || stop "cannot write to $RUN_URL: $(reason)"
  watch_run
}

interrupted() {
  trap '' INT TERM
  printf '\n'
  say "interrupted ($1). The run and its slice go on, and BILL if the slice is up; a queued request may still be granted."
  say "Goes on: the same submit. Ends the billing: launch/tpu_pod.sh delete --name $NAME"
  exit 130
}

# Everything was checked here, where it can be read; what is left goes on without this terminal.
detach() {
  local command=("${BASH:-bash}" "$ROOT/launch/tpu_pod.sh" submit) argument past='' unit=tpu-pod-$NAME
  for argument in "${ARGUMENTS[@]}"; do
    [ "$argument" != -- ] || past=1
    if [ "$argument" = --detach ] && [ -z "$past" ]; then argument=--watch; fi
    command+=("$argument")
  done
  if systemctl --user show-environment >/dev/null 2>&1 && command -v systemd-run >/dev/null; then
    systemd-run --user --collect --quiet "--unit=$unit" "--setenv=PATH=$PATH" "--setenv=PYTHON=$PYTHON" \
      "--property=StandardOutput=append:$LOCAL/watcher.log" "--property=StandardError=append:$LOCAL/watcher.log" \
      -- "${command[@]}" || stop "systemd-run failed; use --watch in a terminal that stays open"
    say "watching as the user unit $unit; loginctl enable-linger keeps it after you log out"
  elif command -v tmux >/dev/null; then
    # shellcheck disable=SC2016 # for the inner shell
    tmux new-session -d -s "$unit" -- "${BASH:-bash}" -c 'exec "$@" >>"$0" 2>&1' "$LOCAL/watcher.log" "${command[@]}" ||
      stop "tmux failed; is a session $unit running already?"
    say "watching in the tmux session $unit"
  else
    die "--detach needs a user systemd or tmux; install tmux, or use --watch in a terminal that stays open"
  fi
  say "its output: $LOCAL/watcher.log; launch/tpu_pod.sh status --name $NAME"
  exit 0
}

# Every command that submit --watch would run until the first slice is finished, in order.
dry_run() {
  local host slice node verb
  choose_code >/dev/null
  check_config
  ATTEMPT=1 TREE=TREE
  echo "# run $NAME: $SLICES x $TYPE ($TIER), topology $TOPOLOGY, $((HOSTS * SLICES)) hosts, $((CHIPS * SLICES)) chips"
  printf '%s\n' "$MESH" | sed 's/^/# /'
  echo "# environment of every trainer: JAX_PLATFORMS=tpu,cpu; coordinator and process id from the TPU VM's metadata"
  echo "# workdir $WORKDIR, dataset $DATA"
  echo "# --- check"
  show gcloud auth list '--filter=status:ACTIVE' '--format=value(account)'
  show gcloud compute tpus accelerator-types describe "$TYPE" "--zone=$ZONE" "--project=$PROJECT" '--format=value(type)'
  [[ $DATA != gs://* ]] || show gcloud storage cat "$DATA/manifest.json"
  plan_command
  [ -z "$PLAN" ] || show python "${PLAN_COMMAND[@]}"
  echo "# --- record the run and its code (TREE is that of git)"
  show gcloud storage cp --quiet --if-generation-match=0 watch "$RUN_URL/watch"
  show gcloud storage cp --quiet --if-generation-match=0 run "$RUN_URL/run"
  show git archive --format=tar.gz -o TREE.tar.gz TREE
  show gcloud storage cp --quiet TREE.tar.gz "$RUN_URL/code/TREE.tar.gz"
  show gcloud storage cp --quiet uncommitted.patch "$RUN_URL/code/TREE.patch"
  show gcloud storage cp --quiet trainer.args "$RUN_URL/trainer.args"
  show gcloud storage cp --quiet events "$RUN_URL/events"
  echo "# --- ask for the slice, and look at it until it is ACTIVE and its nodes READY"
  create_command
  show gcloud "${CREATE[@]}"
  describe_command
  show gcloud "${DESCRIBE[@]}" '--format=value(state.state)'
  for ((slice = 0; slice < SLICES; slice++)); do
    node=$(node_name "$slice")
    show gcloud compute tpus tpu-vm describe "$node" "--project=$PROJECT" "--zone=$ZONE" '--format=csv[no-heading](state,health)'
  done
  for verb in setup start; do
    echo "# --- $verb all hosts"
    for ((host = 0; host < HOSTS * SLICES; host++)); do
      host_command "$host" "$verb"
      show gcloud "${SSH[@]}"
    done
  done
  echo "# --- follow, until host 0 says that the run is finished"
  show gcloud storage cat "$RUN_URL/attempts/1/host-*.status"
  echo "# --- end the billing"
  delete_command
  show gcloud "${DELETE[@]}"
}
