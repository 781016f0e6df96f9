# shellcheck shell=bash
# What submit makes sure of before anything is created, and the code that the run is made of.

# The person, the project, the slice type in the zone, and the bucket.
check_cloud() {
  command -v gcloud >/dev/null || die "gcloud is not installed; see cloud.google.com/sdk/docs/install"
  ask auth list '--filter=status:ACTIVE' '--format=value(account)' || stop "gcloud auth list failed: $(reason)"
  [ -n "$OUT" ] || die "gcloud has no account; run gcloud auth login"
  ask compute tpus accelerator-types describe "$TYPE" "--zone=$ZONE" "--project=$PROJECT" '--format=value(type)' ||
    case $KIND in
      absent | invalid) die "zone $ZONE has no $TYPE for project $PROJECT; gcloud compute tpus accelerator-types list --zone=$ZONE shows what it has" ;;
      permission) die "project $PROJECT refuses: $(reason); check the project's id, that the Cloud TPU API is enabled and your role (TPU Admin)" ;;
      auth) die "gcloud's login has expired; run gcloud auth login" ;;
      *) stop "cannot ask for $TYPE in $ZONE: $(reason)" ;;
    esac
  printf 'written by launch/tpu_pod.sh to see whether it may\n' >"$TEMPORARY/probe"
  put "$TEMPORARY/probe" "$RUN_URL/probe" ||
    case $KIND in
      absent) die "--bucket=$BUCKET does not exist; gcloud storage buckets create gs://NAME --location=${ZONE%-*} makes one" ;;
      permission) die "--bucket=$BUCKET cannot be written to: $(reason); you need the role Storage Object Admin there" ;;
      auth) die "gcloud's login has expired; run gcloud auth login" ;;
      *) stop "cannot write to $BUCKET: $(reason)" ;;
    esac
}

# The config, the mesh on this many devices, and the dataset: checked by the trainer's own code on this machine.
check_config() {
  local manifest=()
  if [[ $DATA == gs://* ]] && [ -z "$DRY_RUN" ]; then
    ask storage cat "$DATA/manifest.json" ||
      case $KIND in
        absent) die "--data=$DATA holds no manifest.json; prepare the dataset (data/README.md) or name its folder" ;;
        *) stop "cannot read $DATA/manifest.json: $(reason)" ;;
      esac
    printf '%s\n' "$OUT" >"$TEMPORARY/manifest.json"
    manifest=("--manifest=$TEMPORARY/manifest.json")
  fi
  # exec'd by name: a mistake in the flags is one line on stderr already, and exit code 2.
  (cd "$ROOT" && JAX_PLATFORMS=cpu "$PYTHON" -m launch.preflight "--devices=$((CHIPS * SLICES))" \
    "--slices=$SLICES" "--data=$DATA" "${manifest[@]}" -- "${TRAINER_ARGS[@]}") >"$TEMPORARY/preflight"
  case $? in
    0) MESH=$(<"$TEMPORARY/preflight") ;;
    2) exit 2 ;;
    *) die "$PYTHON cannot load the trainer on this machine; run make setup, or set PYTHON" ;;
  esac
}

# What the TPU compiler says of this config on this slice, without one. Its exit codes: 0 fits, 2 a mistake, 3 does not.
check_plan() {
  [ -n "$PLAN" ] || return 0
  local code=0 mistake key
  plan_command
  key=$(printf '%s\n' "$TREE" "${PLAN_COMMAND[@]}" | cksum)
  if [ "$(cat "$LOCAL/planned" 2>/dev/null)" = "$key" ]; then
    say "the plan of an earlier submit says that it fits"
    return
  fi
  say "asking the TPU compiler whether it fits: about a minute, --no-plan skips it"
  (cd "$ROOT" && "$PYTHON" "${PLAN_COMMAND[@]}") >"$TEMPORARY/plan.txt" 2>"$TEMPORARY/plan.stderr" || code=$?
  mistake=$(sed -n 's/^error: //p' "$TEMPORARY/plan.stderr" | tail -n 1)
  case $code in
    0)
      sed -n '1p; /^  total /p; /^  estimated: /p' "$TEMPORARY/plan.txt"
      printf '%s\n' "$key" >"$LOCAL/planned"
      ;;
    3)
      cat "$TEMPORARY/plan.txt" >&2
      die "by the plan this config does not fit $SLICES x $TYPE; change what the plan names, or the slice (--no-plan skips it)"
      ;;
    *) die "launch.plan failed (exit code $code): ${mistake:-$(tail -n 1 "$TEMPORARY/plan.stderr")}; mend it, or --no-plan" ;;
  esac
}

plan_command() {
  PLAN_COMMAND=(-m launch.plan "--topology=$TYPE" "--slices=$SLICES")
  [ -z "$PRICE" ] || PLAN_COMMAND+=("--price-per-chip-hour=$PRICE")
  PLAN_COMMAND+=("${TRAINER_ARGS[@]}")
}

# The code of the run: HEAD with the uncommitted changes of tracked files, as a tree of git. Sets TREE and COMMIT.
# A file that git does not track is not part of the run: it might be anything, a key among other things.
choose_code() {
  local untracked secrets
  COMMIT=$(git -C "$ROOT" rev-parse --verify -q HEAD) ||
    die "$ROOT is not a git checkout with a commit, so the run's code could not be recorded; git init, add and commit it"
  cp "$(git -C "$ROOT" rev-parse --absolute-git-dir)/index" "$TEMPORARY/index"
  GIT_INDEX_FILE=$TEMPORARY/index git -C "$ROOT" add -u
  TREE=$(GIT_INDEX_FILE=$TEMPORARY/index git -C "$ROOT" write-tree) || die "git could not write a tree of $ROOT"
  secrets=$(git -C "$ROOT" grep -l -I -E "$SECRET_PATTERN" "$TREE" -- | head -n 1)
  [ -z "$secrets" ] || die "${secrets#*:} holds a key or token, which must not be uploaded; take it out of git"
  git -C "$ROOT" diff --binary "$COMMIT" "$TREE" >"$TEMPORARY/uncommitted.patch"
  # Lines that were taken out are in the patch still.
  ! grep -a -q -E "$SECRET_PATTERN" "$TEMPORARY/uncommitted.patch" ||
    die "the uncommitted changes take a key or token out, and are recorded with the run; commit them first"
  untracked=$(git -C "$ROOT" ls-files --others --exclude-standard | wc -l | tr -d ' ')
  [ "$untracked" = 0 ] || say "$untracked files that git does not track are not part of the run; git add those that are"
  [ "$TREE" = "$(git -C "$ROOT" rev-parse 'HEAD^{tree}')" ] || say "uncommitted changes are part of the run and recorded with it"
}

upload_code() {
  local archive=$TEMPORARY/$TREE.tar.gz
  git -C "$ROOT" archive --format=tar.gz -o "$archive" "$TREE" || stop "git archive failed"
  put_surely "$archive" "$RUN_URL/code/$TREE.tar.gz" || stop "cannot upload the code: $(reason)"
  put_surely "$TEMPORARY/uncommitted.patch" "$RUN_URL/code/$TREE.patch" || stop "cannot upload the patch: $(reason)"
  printf '%s\n' "${TRAINER_ARGS[@]}" >"$LOCAL/trainer.args"
  put_surely "$LOCAL/trainer.args" "$RUN_URL/trainer.args" || stop "cannot upload the trainer's flags: $(reason)"
}
