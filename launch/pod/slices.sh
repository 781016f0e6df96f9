# shellcheck shell=bash
# What the slice types are: hosts, chips, topology, and the names that Cloud TPU and GKE give them.

# describe_type TYPE: sets HOSTS and CHIPS (of one slice), TOPOLOGY, RUNTIME (the VM image) and GKE_ACCELERATOR.
# Fails for a type that is not listed. v4 and v5p count TensorCores, two a chip; v5e and v6e count chips.
describe_type() {
  local family=${1%-*} size=${1##*-}
  case $family in
    v4 | v5p)
      TOPOLOGY=$(cube_topology "$size") || return 1
      HOSTS=$((size / 8)) CHIPS=$((size / 2))
      if [ "$family" = v4 ]; then
        RUNTIME=tpu-ubuntu2204-base GKE_ACCELERATOR=tpu-v4-podslice
      else
        RUNTIME=v2-alpha-tpuv5 GKE_ACCELERATOR=tpu-v5p-slice
      fi
      ;;
    v5litepod | v6e)
      TOPOLOGY=$(plane_topology "$size") || return 1
      CHIPS=$size
      # Up to eight chips are one host; larger slices are made of hosts with four.
      if [ "$size" -le 8 ]; then HOSTS=1; else HOSTS=$((size / 4)); fi
      if [ "$family" = v6e ]; then
        RUNTIME=v2-alpha-tpuv6e GKE_ACCELERATOR=tpu-v6e-slice
      else
        RUNTIME=v2-alpha-tpuv5-lite GKE_ACCELERATOR=tpu-v5-lite-podslice
      fi
      ;;
    *) return 1 ;;
  esac
}

cube_topology() {
  case $1 in
    8) echo 2x2x1 ;;
    16) echo 2x2x2 ;;
    32) echo 2x2x4 ;;
    64) echo 2x4x4 ;;
    128) echo 4x4x4 ;;
    256) echo 4x4x8 ;;
    512) echo 4x8x8 ;;
    1024) echo 8x8x8 ;;
    1536) echo 8x8x12 ;;
    2048) echo 8x8x16 ;;
    4096) echo 8x16x16 ;;
    *) return 1 ;;
  esac
}

plane_topology() {
  case $1 in
    1) echo 1x1 ;;
    4) echo 2x2 ;;
    8) echo 2x4 ;;
    16) echo 4x4 ;;
    32) echo 4x8 ;;
    64) echo 8x8 ;;
    128) echo 8x16 ;;
    256) echo 16x16 ;;
    *) return 1 ;;
  esac
}

# node_name SLICE: the node of a slice; several are numbered by the service in this way.
node_name() {
  if [ "$SLICES" = 1 ]; then echo "$NAME"; else echo "$NAME-$1"; fi
}
