# shellcheck shell=bash
# Calling gcloud: what it says is sorted into kinds, because "failed" never means "does not exist".

# call ARGUMENT...: runs gcloud; sets OUT, ERROR and KIND (see classify), returns gcloud's exit code.
call() {
  local code=0
  OUT=$(gcloud "$@" 2>"$TEMPORARY/stderr" </dev/null) || code=$?
  ERROR=$(<"$TEMPORARY/stderr") KIND=ok
  [ "$code" = 0 ] || KIND=$(classify "$ERROR")
  return "$code"
}

# ask ARGUMENT...: a call that changes nothing, so it is tried again when the network or a rate limit is in the way.
ask() {
  local try
  for try in 1 2 4 8; do
    call "$@" && return 0
    [ "$KIND" = network ] || [ "$KIND" = rate ] || return 1
    pause "$((RETRY_SECONDS * try))"
  done
  call "$@"
}

# classify TEXT: the kind of an error of gcloud. Order matters: a rate limit and a quota both come as 429, followed
# by a remark about network connectivity.
classify() {
  case $1 in
    *"do not currently have an active account"* | *"refreshing your current auth tokens"* | *"Reauthentication"* | \
      *"invalid_grant"* | *UNAUTHENTICATED*) echo auth ;;
    *"Reservation not found"* | *LOCATION_POLICY_VIOLATED* | *"could not be found in the zonal accelerator"*) echo invalid ;;
    *"Quota exceeded for quota metric"* | *RATE_LIMIT_EXCEEDED* | *rateLimitExceeded*) echo rate ;;
    *uota*"Limit: 0"* | *uota*"Limit 0 "*) echo no-quota ;;
    *"Quota limit '"* | *"Quota '"* | *ForTPUAPI*) echo quota ;;
    *"no more capacity"* | *"nsufficient reserved capacity"* | *"nsufficient capacity"*) echo capacity ;;
    *"HTTPError 412"* | *"conditionNotMet"* | *"recondition"* | *"pre-condition"*) echo conflict ;;
    *ALREADY_EXISTS* | *"already exists"*) echo exists ;;
    *PERMISSION_DENIED* | *"Permission '"* | *"does not have"*access* | *"Read access to project"* | *"HTTPError 403"* | \
      *"is not authorized"*) echo permission ;;
    *NOT_FOUND* | *"was not found"* | *"matched no objects"* | *"not found: 404"* | *"HTTPError 404"*) echo absent ;;
    *INVALID_ARGUMENT* | *"is not supported"* | *"Invalid value"* | *"unrecognized arguments"*) echo invalid ;;
    *"'status': 429"* | *"Too Many Requests"*) echo rate ;;
    *) echo network ;;
  esac
}

# printable TEXT: on one line, without terminal controls: others write to the bucket too.
printable() {
  printf '%s' "$1" | LC_ALL=C tr -d '\000-\010\012-\037\177'
}

# The line of gcloud's error that says what is wrong, without terminal controls.
reason() {
  local line
  line=$(printf '%s\n' "$ERROR" | LC_ALL=C tr -d '\000-\010\013-\037\177' | sed -n '/ERROR/{p;q;}')
  [ -n "$line" ] || line=$(printf '%s\n' "$ERROR" | LC_ALL=C tr -d '\000-\010\013-\037\177' | sed -n '/./{p;q;}')
  printf '%.400s\n' "${line:-gcloud said nothing}"
}

# fetch URL FILE: an object's content. put FILE URL [FLAG...]: the other way.
fetch() {
  ask storage cat "$1" && printf '%s\n' "$OUT" >"$2"
}

put() {
  local file=$1 url=$2
  shift 2
  call storage cp --quiet "$@" "$file" "$url"
}

# put_surely FILE URL: again and again for a while; losing it would lose the run's history.
put_surely() {
  local try
  for try in 1 2 4 8 16; do
    put "$1" "$2" && return 0
    [ "$KIND" = network ] || [ "$KIND" = rate ] || return 1
    pause "$((RETRY_SECONDS * try))"
  done
  return 1
}

# show COMMAND...: what a dry run prints, quoted so that it can be pasted.
show() {
  local words
  printf -v words '%q ' "$@"
  printf '%s\n' "${words% }"
}
