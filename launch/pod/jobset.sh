# shellcheck shell=bash
# The same run as a JobSet for GKE.

# yaml TEXT: as a single-quoted scalar, in which nothing but the quote itself has a meaning.
yaml() {
  printf "'%s'" "${1//\'/\'\'}"
}

render_jobset() {
  local template arguments='' argument bucket folder
  matches "$IMAGE" '[a-z0-9][A-Za-z0-9._:/@-]*' ||
    die "--image=${IMAGE@Q} is not a container image; give one that holds this repository, see launch/README.md"
  [ "$SLICES" = 1 ] || [ "$HOSTS" -gt 1 ] || die "several slices of one host each are not possible on GKE; take a larger --type"
  [[ $DATA == gs://* ]] || die "--data=$DATA must be gs://BUCKET/FOLDER on GKE, which mounts it"
  # Generated names of pods hold the run's name twice.
  [ ${#NAME} -le 30 ] || die "--name=$NAME is too long for a JobSet; at most 30 characters"
  template=$(<"$ROOT/launch/jobset.yaml")
  for argument in "${TRAINER_ARGS[@]}" "--workdir=$WORKDIR" --config.data.path=/data; do
    arguments+=$'\n'"                    - $(yaml "$argument")"
  done
  bucket=${DATA#gs://} folder=${bucket#*/} bucket=${bucket%%/*}
  [ "$folder" != "$bucket" ] || folder=.
  if [ "$TIER" != spot ]; then
    template=$(printf '%s\n' "$template" | sed '/# spot only$/d')
  fi
  printf '%s\n' "$template" | sed 's/ *# spot only$//' | while IFS= read -r line; do
    line=${line//@NAME@/$(yaml "$NAME")}
    line=${line//@SLICES@/$SLICES}
    line=${line//@HOSTS@/$HOSTS}
    line=${line//@CHIPS_PER_HOST@/$((CHIPS / HOSTS))}
    line=${line//@ACCELERATOR@/$GKE_ACCELERATOR}
    line=${line//@TOPOLOGY@/$TOPOLOGY}
    line=${line//@MAX_RESTARTS@/$MAX_ATTEMPTS}
    line=${line//@IMAGE@/$(yaml "$IMAGE")}
    line=${line//@DATA_BUCKET@/$(yaml "$bucket")}
    line=${line//@DATA_FOLDER@/$folder}
    line=${line//@ARGUMENTS@/$arguments}
    printf '%s\n' "$line"
  done
}
