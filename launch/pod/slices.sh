# shellcheck shell=bash
# What the slice types are: launch/slices.py has the table.

# describe_type TYPE: sets TYPE (as Cloud TPU spells it), HOSTS and CHIPS (of one slice), TOPOLOGY, RUNTIME (the VM
# image) and GKE_ACCELERATOR. Fails for a type that is not listed.
describe_type() {
  local lines
  lines=$(python3 "$ROOT/launch/slices.py" "$1" 2>/dev/null) || return 1
  eval "$lines"
}

# node_name SLICE: the node of a slice; several are numbered by the service in this way.
node_name() {
  if [ "$SLICES" = 1 ]; then echo "$NAME"; else echo "$NAME-$1"; fi
}
