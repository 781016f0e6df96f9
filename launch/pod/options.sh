# shellcheck shell=bash
# The command line: parsed into variables, every value checked before it is used anywhere.

# Sets NAME, TYPE, ZONE, ... and TRAINER_ARGS (what follows --).
parse_options() {
  NAME='' TYPE='' ZONE='' PROJECT='' BUCKET='' TIER='' SLICES=1 WORKDIR='' DATA='' VALID_UNTIL=''
  NETWORK='' SUBNETWORK='' SERVICE_ACCOUNT='' INTERNAL_IPS='' MAX_ATTEMPTS=100 MAX_HOURS=720 PRICE=''
  PLAN=1 WATCH='' DETACH='' DRY_RUN='' TAKE_OVER='' YES='' FOLLOW='' HOST='' IMAGE='' TRAINER_ARGS=()
  local option value
  while [ $# -gt 0 ]; do
    option=$1 value=''
    case $option in
      --)
        shift
        TRAINER_ARGS=("$@")
        break
        ;;
      --*=*)
        value=${option#*=} option=${option%%=*}
        shift
        ;;
      --name | --type | --zone | --project | --bucket | --slices | --workdir | --data | --valid-until | --network | \
        --subnetwork | --service-account | --max-attempts | --max-hours | --price | --host | --image)
        [ $# -ge 2 ] || die "$option needs a value"
        value=$2
        shift 2
        ;;
      *) shift ;;
    esac
    allowed "$option" || die "$COMMAND has no option ${option@Q}; see launch/tpu_pod.sh help"
    case $option in
      --name) NAME=$value ;;
      --type) TYPE=$value ;;
      --zone) ZONE=$value ;;
      --project) PROJECT=$value ;;
      --bucket) BUCKET=${value%/} ;;
      --slices) SLICES=$value ;;
      --workdir) WORKDIR=${value%/} ;;
      --data) DATA=${value%/} ;;
      --valid-until) VALID_UNTIL=$value ;;
      --network) NETWORK=$value ;;
      --subnetwork) SUBNETWORK=$value ;;
      --service-account) SERVICE_ACCOUNT=$value ;;
      --max-attempts) MAX_ATTEMPTS=$value ;;
      --max-hours) MAX_HOURS=$value ;;
      --price) PRICE=$value ;;
      --host) HOST=$value ;;
      --image) IMAGE=$value ;;
      --spot | --reserved | --on-demand)
        [ -z "$TIER" ] || [ "$TIER" = "${option#--}" ] || die "--$TIER and $option exclude each other; choose one"
        TIER=${option#--}
        ;;
      --internal-ips) INTERNAL_IPS=1 ;;
      --no-plan) PLAN='' ;;
      --watch) WATCH=1 ;;
      --detach) DETACH=1 WATCH=1 ;;
      --dry-run) DRY_RUN=1 ;;
      --take-over) TAKE_OVER=1 ;;
      --yes) YES=1 ;;
      -f) FOLLOW=1 ;;
    esac
  done
}

# Whether COMMAND takes this option: one that would be ignored is a mistake.
allowed() {
  local slice=' --name --type --zone --project --bucket --slices --workdir --data --spot --reserved --on-demand --max-attempts '
  local known=' --name --bucket '
  case $COMMAND in
    submit) known="$slice --valid-until --network --subnetwork --service-account --internal-ips --max-hours --price \
 --no-plan --watch --detach --dry-run --take-over " ;;
    render-jobset) known="$slice --image " ;;
    logs) known+=' --host -f ' ;;
    ssh) known+=' --host ' ;;
    delete) known+=' --yes ' ;;
  esac
  [[ $known == *" $1 "* ]]
}

# matches VALUE REGEX: the whole of it, on one line.
matches() {
  [[ $1 != *$'\n'* && $1 =~ ^($2)$ ]]
}

NAME_PATTERN='[a-z]([a-z0-9-]{0,38}[a-z0-9])?'
ZONE_PATTERN='[a-z]+-[a-z]+[0-9]+-[a-z]'
PROJECT_PATTERN='([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]'
BUCKET_PATTERN='gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[A-Za-z0-9_][A-Za-z0-9._-]*)*'
FOLDER_PATTERN="$BUCKET_PATTERN|(/[A-Za-z0-9_.-]+)+"
PRICE_PATTERN='[0-9]{1,4}(\.[0-9]{1,6})?'
# What nobody wants to find in a bucket: private keys, and tokens that say by themselves what they are.
SECRET_PATTERN='BEGIN [A-Z ]*PRIVATE[ ]KEY|"private[_]key"|(hf|ghp)_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}'

check_name() {
  matches "$NAME" "$NAME_PATTERN" ||
    die "--name=${NAME@Q} must be 1 to 40 of a-z, 0-9 and -, start with a letter and end without -; choose another"
}

check_bucket() {
  matches "$BUCKET" "$BUCKET_PATTERN" ||
    die "--bucket=${BUCKET@Q} is not gs://BUCKET or gs://BUCKET/FOLDER; give the bucket that keeps the run"
}

# Everything of submit and render-jobset that can be checked without asking anybody.
check_options() {
  [ -n "$NAME" ] || die "--name is missing; give the run a name, e.g. --name c4-d12"
  check_name
  describe_type "$TYPE" ||
    die "--type=${TYPE@Q} is not a slice type; e.g. v4-8, v4-32, v5p-16, v5litepod-16 or v6e-16"
  matches "$ZONE" "$ZONE_PATTERN" || die "--zone=${ZONE@Q} is not a zone; e.g. --zone us-central2-b"
  matches "$PROJECT" "$PROJECT_PATTERN" ||
    die "--project=${PROJECT@Q} is not a project id; gcloud projects list shows yours"
  check_bucket
  matches "$SLICES" '[1-9][0-9]{0,2}' || die "--slices=${SLICES@Q} must be a whole number from 1 to 999"
  [ -n "$TIER" ] || die "say how the slice is paid for: --spot, --reserved or --on-demand (the full price)"
  [ "$TIER" = spot ] || [ "$TIER" = reserved ] || [ "$TIER" = on-demand ] || die "the tier ${TIER@Q} is not one"
  matches "$MAX_ATTEMPTS" '[1-9][0-9]{0,3}' || die "--max-attempts=${MAX_ATTEMPTS@Q} must be a whole number from 1 to 9999"
  matches "$MAX_HOURS" '[1-9][0-9]{0,4}' || die "--max-hours=${MAX_HOURS@Q} must be a whole number of hours, at least 1"
  [ -z "$PRICE" ] || matches "$PRICE" "$PRICE_PATTERN" ||
    die "--price=${PRICE@Q} must be dollars per chip and hour, e.g. --price 1.25"
  [ -z "$VALID_UNTIL" ] || matches "$VALID_UNTIL" '([0-9]{1,5}[smhd])+' ||
    die "--valid-until=${VALID_UNTIL@Q} is not a duration; e.g. --valid-until 6h"
  [ -z "$NETWORK" ] || matches "$NETWORK" '[a-z][a-z0-9/_.-]*' || die "--network=${NETWORK@Q} is not a network's name"
  [ -z "$SUBNETWORK" ] || matches "$SUBNETWORK" '[a-z][a-z0-9/_.-]*' ||
    die "--subnetwork=${SUBNETWORK@Q} is not a subnetwork's name"
  [ -z "$SERVICE_ACCOUNT" ] || matches "$SERVICE_ACCOUNT" '[A-Za-z0-9][A-Za-z0-9._-]*@[a-z0-9.-]+' ||
    die "--service-account=${SERVICE_ACCOUNT@Q} is not the e-mail address of a service account"
  check_trainer_args
  RUN_URL=$BUCKET/runs/$NAME
  [ -n "$WORKDIR" ] || WORKDIR=$RUN_URL/workdir
  matches "$WORKDIR" "$FOLDER_PATTERN" ||
    die "--workdir=${WORKDIR@Q} must be gs://BUCKET/FOLDER, or an absolute path that all hosts share"
  matches "$DATA" "$FOLDER_PATTERN" ||
    die "--data=${DATA@Q} must be gs://BUCKET/FOLDER of a prepared dataset, or a path that all hosts have"
}

# What follows --: flags of the trainer alone. They are stored, so no secret may be among them.
check_trainer_args() {
  local argument config='' folder
  [ ${#TRAINER_ARGS[@]} -gt 0 ] || die "nothing follows --; give the trainer's flags, e.g. -- --config=configs/c4.py:d12"
  for argument in "${TRAINER_ARGS[@]}"; do
    [[ $argument != *[[:cntrl:]]* ]] || die "${argument@Q} holds a control character; give each flag on one line"
    [[ $argument == --*=* ]] || die "${argument@Q} is not a flag of the trainer; write --config.key=value"
    case $argument in
      --config=*) config=${argument#--config=} ;;
      --workdir=*) die "--workdir belongs before --; by default it is in the bucket" ;;
      --config.data.path=*) die "give the dataset as --data gs://BUCKET/FOLDER before --, not as --config.data.path" ;;
    esac
    [[ ! $argument =~ $SECRET_PATTERN ]] ||
      die "the value of ${argument%%=*} looks like a secret; flags are stored and logged, so the trainer must read it elsewhere"
    shopt -s nocasematch
    if [[ ${argument%%=*} =~ (token|secret|passw|credential|api_?key)s?$ ]]; then
      shopt -u nocasematch
      die "${argument%%=*} looks like a secret; flags are stored and logged, so the trainer must read it elsewhere"
    fi
    shopt -u nocasematch
  done
  [ -n "$config" ] || die "the trainer's flags hold no --config=FILE, e.g. -- --config=configs/c4.py:d12"
  [ -f "$ROOT/${config%%:*}" ] || die "--config: there is no file ${config%%:*} in the repository; e.g. --config=configs/c4.py:d12"
  # A dataset per family of configs: configs/c4.py trains on BUCKET/data/c4 unless told otherwise.
  folder=${config%%:*} folder=${folder##*/}
  [ -n "$DATA" ] || DATA=$BUCKET/data/${folder%.py}
}

# Project and zone that were not given are those of gcloud's configuration.
fill_defaults() {
  if [ -z "$PROJECT" ] && [ -z "$DRY_RUN" ]; then PROJECT=$(gcloud config get project 2>/dev/null | tail -n 1); fi
  if [ -z "$ZONE" ] && [ -z "$DRY_RUN" ]; then ZONE=$(gcloud config get compute/zone 2>/dev/null | tail -n 1); fi
  [ -n "$PROJECT" ] || die "--project is missing, and gcloud has no default; gcloud projects list shows yours"
  [ -n "$ZONE" ] || die "--zone is missing, and gcloud has no default; e.g. --zone us-central2-b"
}

# Commands on a run that exists name it by --name; without it the only one there is, or the last one submitted.
choose_run() {
  if [ -z "$NAME" ] && [ -f "$STATE/last" ]; then
    NAME=$(<"$STATE/last")
    local runs=("$STATE"/runs/*/run)
    [ -z "$1" ] || [ ${#runs[@]} = 1 ] || die "there are ${#runs[@]} runs; say which: $COMMAND --name $NAME"
  fi
  [ -n "$NAME" ] || die "no run was submitted from this machine; give --name NAME --bucket gs://BUCKET"
  check_name
  LOCAL=$STATE/runs/$NAME
  if [ -n "$BUCKET" ]; then
    check_bucket
    RUN_URL=$BUCKET/runs/$NAME
    mkdir -p "$LOCAL"
    fetch "$RUN_URL/run" "$LOCAL/run" || die "there is no run $NAME in $BUCKET ($KIND); list shows those of this machine"
  fi
  [ -f "$LOCAL/run" ] || die "no run $NAME was submitted from this machine; list shows those that were, or add --bucket"
  load_record "$LOCAL/run"
}
