#!/usr/bin/env bash
# Runs on a TPU VM, called over ssh by launch/tpu_pod.sh. Every verb can be repeated.
#   host.sh setup NAME RUN_URL TREE ATTEMPT HOST [FLAGS_SHA256]    Python, packages, gcsfuse, the worker's unit
#   host.sh start NAME                              starts the worker, or restarts it if code or flags are new
#   host.sh stop NAME                               lets the trainer save, and stops
set -euo pipefail
# Others may have accounts on the machine.
umask 077

verb=$1 name=$2
home=$HOME/runs/$name unit=trainer-$name

value_of() { sed -n "s/^$1=//p" "$home/run"; }

setup() {
  local run_url=$1 tree=$2 attempt=$3 host=$4 flags=${5:-} code
  code=$home/code-$tree
  # A watcher that was killed may have left a set-up at work.
  exec 9>"$home/lock"
  flock 9
  mkdir -p "$home/new"
  gcloud storage cp --quiet "$run_url/run" "$run_url/trainer.args" "$home/new/"
  # They name the config, which is a program, and the environment.
  [ -z "$flags" ] || echo "$flags  $home/new/trainer.args" | sha256sum --check --quiet || {
    echo "ERROR: $run_url/trainer.args is not what was submitted; submit again, and see who may write to the bucket" >&2
    return 1
  }
  mv "$home/new/"* "$home/"
  # Without this, logs and checkpoints would get nowhere, and a host that says nothing is noticed late.
  printf 'written by launch/host.sh to see whether it may\n' >"$home/probe"
  gcloud storage cp --quiet "$home/probe" "$run_url/attempts/$attempt/host-$host.probe" || {
    echo "ERROR: host $host cannot write to $run_url: its service account needs the role Storage Object Admin" >&2
    return 1
  }
  [ "$host" != 0 ] || may_delete_itself
  install_packages "$code" "$host" "${run_url%/runs/*}/packages"
  # What apt reads is read by all.
  (umask 022 && install_gcsfuse)
  # Another attempt on the same machine starts anew; the same one goes on counting.
  if [ "$(cat "$home/attempt" 2>/dev/null)" != "$attempt" ]; then
    rm -f "$home/status" "$home/log" "$home/sent"
    printf '%s\n' "$attempt" >"$home/attempt"
  fi
  printf '%s\n' "$host" >"$home/host"
  printf '%s\n' "$run_url" >"$home/url"
  ln -sfn "$code" "$home/current"
  write_unit | sudo tee "/etc/systemd/system/$unit.service" >/dev/null
  sudo systemctl daemon-reload
  # After a reboot, as maintenance does, the worker comes back by itself.
  sudo systemctl enable --quiet "$unit"
}

# A slice that may not delete itself would bill for as long as nobody watches. Nothing has the name that is asked for, and
# the service looks at the role before it looks for that.
may_delete_itself() {
  local said
  said=$(timeout 120 gcloud compute tpus queued-resources delete "$name-$(value_of RUN_ID)" --quiet \
    "--project=$(value_of PROJECT)" "--zone=$(value_of ZONE)" 2>&1) || true
  if [[ $said == *PERMISSION_DENIED* || $said == *"ermission '"* ]]; then
    echo "ERROR: this slice may not delete itself when nobody watches: its service account needs the role TPU Admin" >&2
    return 1
  fi
}

# A Python of its own, since the image's is older than 3.11; made anew only when the pinned versions change. It is made
# of files that the first host ever has put into the bucket, so that a slice that replaces another one needs no package
# index. Whoever may write there cannot change them: launch/packages.txt has the hashes of wheels, uv that of Python.
install_packages() {
  local code=$1 host=$2 url=$3 key venv packages=$home/packages
  key=$(cat "$code/launch/packages.txt" "$code/pyproject.toml" "$code"/model/*/pyproject.toml | cksum | tr ' ' -)
  venv=$home/venv-$key url=$url/$(cksum <"$code/launch/packages.txt" | tr ' ' -).tar
  if [ ! -e "$venv/complete" ]; then
    if ! { take_packages "$url" && make_venv "$code" "$venv"; }; then
      echo "not yet to be had from $url; loading the packages from the index"
      rm -rf "$packages"
      load_packages "$code"
      make_venv "$code" "$venv"
      [ "$host" != 0 ] || keep_packages "$url" ||
        echo "WARNING: the packages could not be kept in $url; the next slice will need the package index" >&2
    fi
    touch "$venv/complete"
    rm -rf "$packages" "$packages.tar"
  fi
  ln -sfn "$venv" "$home/venv"
}

take_packages() {
  rm -rf "$packages" && mkdir -p "$packages" && gcloud storage cp --quiet "$1" "$packages.tar" &&
    tar -xf "$packages.tar" -C "$packages"
}

keep_packages() { tar -cf "$packages.tar" -C "$packages" . && gcloud storage cp --quiet "$packages.tar" "$1"; }

# For the Python that will be there, by the one that is.
load_packages() {
  local minor platforms=()
  for ((minor = $(getconf GNU_LIBC_VERSION | cut -d . -f 2); minor >= 5; minor--)); do
    platforms+=(--platform "manylinux_2_${minor}_x86_64")
  done
  platforms+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
  python3 -m pip download --quiet --no-deps --only-binary :all: --require-hashes --implementation cp \
    --python-version 3.11 "${platforms[@]}" --requirement "$1/launch/packages.txt" --dest "$packages/wheels"
}

make_venv() {
  local code=$1 venv=$2 uv=$home/uv/bin/uv wheels=(--no-index --find-links "$packages/wheels" --no-deps --require-hashes)
  export UV_PYTHON_CACHE_DIR=$packages/python UV_PYTHON_INSTALL_DIR=$venv.python
  rm -rf "$home/uv" && grep '^uv==' "$code/launch/packages.txt" >"$home/uv.txt" &&
    python3 -m pip install --quiet "${wheels[@]}" --target "$home/uv" --requirement "$home/uv.txt" &&
    "$uv" venv --quiet --clear --managed-python --python 3.11 "$venv" &&
    "$uv" pip install --quiet --python "$venv/bin/python" "${wheels[@]}" --requirement "$code/launch/packages.txt" &&
    "$uv" pip install --quiet --python "$venv/bin/python" --no-index --no-deps --no-build-isolation \
      "$code/model/selective_attention" "$code/model/inference_budget" "$code"
}

install_gcsfuse() {
  grep -q '^DATA=gs://' "$home/run" || return 0
  local version=3.11.2
  [[ "$(gcsfuse --version 2>/dev/null)" != "gcsfuse version $version "* ]] || return 0
  if ! install_from_apt "$version"; then
    command -v gcsfuse >/dev/null || return 1
    echo "WARNING: gcsfuse $version could not be installed; going on with $(gcsfuse --version)" >&2
  fi
}

install_from_apt() {
  # apt's lock is often held by unattended upgrades right after boot.
  local key=/usr/share/keyrings/cloud.google.asc apt=(sudo apt-get -qq -o DPkg::Lock::Timeout=600)
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null &&
    printf 'deb [signed-by=%s] https://packages.cloud.google.com/apt gcsfuse-%s main\n' "$key" "$(lsb_release -cs)" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null &&
    "${apt[@]}" update && "${apt[@]}" install -y --allow-downgrades "gcsfuse=$1"
}

# The network is up for as long as the worker is: stopping goes the other way round, and a save needs it.
# SIGTERM goes to the worker alone, which passes it on; the mount and the data workers stay until it ends.
write_unit() {
  cat <<END
[Unit]
Description=Trainer of run $name
After=network-online.target
Wants=network-online.target

[Service]
User=$(id -un)
WorkingDirectory=$home/current
Environment="PATH=$PATH"
ExecStart=/bin/bash $home/current/launch/worker.sh $home
KillMode=mixed
TimeoutStopSec=180
Restart=on-failure
RestartSec=15
LimitNOFILE=1048576
LimitMEMLOCK=infinity

[Install]
WantedBy=multi-user.target
END
}

start() {
  local revision state=''
  revision=$(readlink "$home/current" | cat - "$home/trainer.args" "$home/attempt" | cksum)
  [ ! -f "$home/status" ] || read -r _ state _ <"$home/status" || true
  case $state in
    mistake | out_of_memory | diverged | corrupt | crashed | lost) ;; # it is at its end, and is asked for again
    *)
      if sudo systemctl is-active --quiet "$unit" && [ "$(cat "$home/revision" 2>/dev/null)" = "$revision" ]; then
        return
      fi
      ;;
  esac
  # Asked for by a person, so that what an earlier start ended with does not count.
  rm -f "$home/status"
  printf '%s\n' "$revision" >"$home/revision"
  sudo systemctl restart "$unit"
}

case $verb in
  setup) setup "${@:3}" ;;
  start) start ;;
  stop) ! sudo systemctl is-active --quiet "$unit" || sudo systemctl stop "$unit" ;;
esac
