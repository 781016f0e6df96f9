"""A recording stand-in for gcloud: queued resources that go through scripted states, a bucket that is a folder, and
hosts that are folders on this machine, on which ssh runs what it is told with real processes.

In the folder FAKE_CLOUD: `script.json` (what will happen), `state.json` (what is), `calls` (one JSON list a line),
`refused` (calls that the real tool would not take), `buckets/`, `hosts/NODE-WORKER/`.
"""

import fcntl
import json
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import flags

# It is called some hundred times in a test, so what few calls need is imported where it is used.

CLOUD = os.environ["FAKE_CLOUD"]
HOSTS = {"v4-8": 1, "v4-16": 2, "v4-32": 4}


def main(arguments):
    with open(f"{CLOUD}/calls", "a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    if reason := flags.mistake(arguments):
        with open(f"{CLOUD}/refused", "a") as refused:
            refused.write(reason + "\n")
        fail(f"ERROR: (gcloud) unrecognized arguments: {reason}", 2)
    if "HOME" not in os.environ:
        fail("ERROR: (gcloud) cannot find its configuration")
    command, rest = flags.split(arguments)
    if os.environ.get("FAKE_NO_TPU_ROLE") and "tpus" in command:  # of a host
        fail("ERROR: (gcloud) PERMISSION_DENIED: Permission 'tpu.nodes.delete' denied on 'projects/p'")
    options = dict(a.partition("=")[::2] for a in rest if a.startswith("-"))
    positionals = [a for a in rest if a == "-" or not a.startswith("-")]
    with Locked():
        state, script = read("state.json"), read("script.json")
        trouble = next(
            (t for t in script.get("errors", []) if t["match"] in " ".join(arguments) and t["times"] > 0), None
        )
        if trouble and trouble.get("skip"):
            trouble["skip"] -= 1
            write("script.json", script)
            trouble = None
        if trouble:
            trouble["times"] -= 1
            write("script.json", script)
            if not trouble.get("after") and not trouble.get("hang"):
                fail(trouble["text"])
        if not trouble or trouble.get("after"):
            action = ACTIONS[command]
            then = action(state, script, positionals, options)
            write("state.json", state)
        if trouble and not trouble.get("hang"):
            fail(trouble["text"])
    # The network takes everything and gives nothing back, for ever or until the test has seen enough.
    while trouble and not (trouble.get("hold") and os.path.exists(f"{CLOUD}/released")):
        time.sleep(0.05)
    if then:
        sys.exit(then())


def fail(text, code=1):
    print(text, file=sys.stderr)
    sys.exit(code)


class Locked:
    def __enter__(self):
        self.file = open(f"{CLOUD}/lock", "w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_):
        self.file.close()


def read(name):
    with open(f"{CLOUD}/{name}") as file:
        return json.load(file)


def write(name, content):
    with open(f"{CLOUD}/{name}.new", "w") as file:
        json.dump(content, file)
    os.replace(f"{CLOUD}/{name}.new", f"{CLOUD}/{name}")


# --- the account and the zone


def auth_list(state, script, positionals, options):
    print(script.get("account", "me@example.com"))


def config_get(state, script, positionals, options):
    print(script.get(positionals[0], ""))


def iam_policy(state, script, positionals, options):
    default = {"role": "roles/tpu.admin", "members": ["serviceAccount:1-compute@developer.gserviceaccount.com"]}
    print(json.dumps({"bindings": script.get("bindings", [default])}))


def accelerator(state, script, positionals, options):
    if positionals[0] not in script.get("types", HOSTS):
        fail(f"ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource '{positionals[0]}' was not found")
    print(positionals[0])


# --- queued resources: a describe moves a request one state on


def missing(name, what="queuedResources"):
    fail(f"ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'projects/p/locations/z/{what}/{name}' was not found")


def create(state, script, positionals, options):
    name = positionals[0]
    if state["requests"].get(name, options).get("zone", options["--zone"]) != options["--zone"]:
        with open(f"{CLOUD}/refused", "a") as refused:
            refused.write(f"a second slice for {name}\n")
    if name in state["requests"]:
        fail(f"ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: {name} already exists")
    number = state["created"]
    attempts = script.get("attempts", [["ACTIVE"]])
    slices = int(options.get("--node-count", 1))
    prefix = options.get("--node-prefix", name)
    nodes = [options["--node-id"]] if slices == 1 else [f"{prefix}-{i}" for i in range(slices)]
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    hosts = HOSTS[options["--accelerator-type"]]
    state["created"] += 1
    state["requests"][name] = {"states": attempts[min(number, len(attempts) - 1)], "hosts": hosts, "port": port}
    state["requests"][name]["zone"] = options["--zone"]
    state["requests"][name]["nodes"] = dict.fromkeys(nodes, "READY")
    labels = options.get("--labels", "")
    state["requests"][name]["labels"] = dict(label.split("=") for label in labels.split(",") if label)
    key, _, startup = options.get("--metadata-from-file", "").partition("=")
    if key == "startup-script":
        with open(startup) as file:
            state["requests"][name]["startup"] = file.read()
    # The service may not find at once what it has just taken.
    state["requests"][name]["hidden"] = script.get("hidden", 0)
    print(f"Create request issued for: [{name}]")


def describe(state, script, positionals, options):
    request = state["requests"].get(in_zone(state, positionals[0], options)) or missing(positionals[0])
    if request.get("zone", options["--zone"]) != options["--zone"]:
        missing(positionals[0])
    if request.get("hidden"):
        request["hidden"] -= 1
        write("state.json", state)
        missing(positionals[0])
    if "labels.run-id" in options["--format"]:
        print(request.get("labels", {}).get("run-id", ""))
        return
    current, _, failure = request["states"][0].partition(" ")
    described = {"state": {"state": current}}
    if failure:
        code, _, message = failure.partition(" ")
        described["state"]["failedData"] = {"error": {"code": int(code), "message": message}}
    described["tpu"] = {
        "nodeSpec": [{"nodeId": n, "node": {"labels": request.get("labels", {})}} for n in request["nodes"]]
    }
    print(json.dumps(described))
    if len(request["states"]) > 1:
        request["states"] = request["states"][1:]


def in_zone(state, name, options):
    """A second request of the name in another zone, as only a mistake makes one, stands as NAME@ZONE."""
    other = f"{name}@{options['--zone']}"
    return other if other in state["requests"] else name


def delete(state, script, positionals, options):
    name = in_zone(state, positionals[0], options)
    if state["requests"].get(name, {}).get("zone", options["--zone"]) != options["--zone"]:
        missing(name)
    request = state["requests"].pop(name, None) or missing(name)
    import glob

    for node in request["nodes"]:
        for folder in glob.glob(f"{CLOUD}/hosts/{node}-*"):
            power_off(folder)


def node_describe(state, script, positionals, options):
    for request in state["requests"].values():
        if positionals[0] in request["nodes"] and request["states"][0] == "ACTIVE":
            print(f"{request['nodes'][positionals[0]]},HEALTHY")
            return
    missing(positionals[0], "nodes")


# --- hosts


def processes(folder):
    """Those that were started on a host, which its environment marks."""
    import glob

    mark = f"FAKE_HOST={folder}".encode()
    for path in glob.glob("/proc/[0-9]*/environ"):
        try:
            with open(path, "rb") as file:
                if mark in file.read().split(b"\0") and int(path.split("/")[2]) != os.getpid():
                    yield int(path.split("/")[2])
        except (OSError, ValueError):
            pass


def power_off(folder):
    import contextlib
    import shutil

    for _ in range(3):
        for pid in list(processes(folder)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
    shutil.rmtree(folder, ignore_errors=True)


def ssh(state, script, positionals, options):
    node, worker = positionals[0], int(options["--worker"])
    for request in state["requests"].values():
        if node in request["nodes"] and request["states"][0] == "ACTIVE":
            break
    else:
        missing(node, "nodes")
    if request["nodes"][node] != "READY":
        fail(f'This TPU has terminal state "{request["nodes"][node]}", so it cannot be used anymore.')
    folder, here = f"{CLOUD}/hosts/{node}-{worker}", os.path.dirname(os.path.abspath(__file__))
    os.makedirs(f"{folder}/metadata", exist_ok=True)
    user = os.environ.get("FAKE_USER", "me")  # of the laptop, and so of the host
    home = folder if user == "me" else f"{folder}/users/{user}"
    os.makedirs(home, exist_ok=True)
    environment = {
        "HOME": home,
        "FAKE_USER": user,
        "FAKE_HOST": folder,
        "FAKE_CLOUD": CLOUD,
        "FAKE_PYTHON": os.environ["FAKE_PYTHON"],
        "PATH": f"{here}/host_bin:{here}:/usr/local/bin:/usr/bin:/bin",
        "COORDINATOR_ADDRESS": f"127.0.0.1:{request['port']}",
        "NUM_PROCESSES": str(request["hosts"] * len(request["nodes"])),
        "PROCESS_ID": str(list(request["nodes"]).index(node) * request["hosts"] + worker),
        **script.get("environment", {}),
    }

    def run():
        import subprocess

        if not make_key():
            fail("ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh-keygen] exited with return code [1].")
        command = ["bash", "-c", options["--command"]] if "--command" in options else ["bash"]
        return subprocess.run(command, env=environment, cwd=home, stdin=subprocess.DEVNULL).returncode

    return run


def make_key():
    """The first call ever makes the key of this laptop; another one at the same time fails."""
    key = f"{os.environ['HOME']}/.ssh/google_compute_engine"
    if os.path.exists(key):
        return True
    os.makedirs(os.path.dirname(key), exist_ok=True)
    try:
        os.close(os.open(f"{key}.new", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    time.sleep(0.5)
    os.rename(f"{key}.new", key)
    return True


# --- the bucket: generations are counted beside each object


def local(url):
    path = f"{CLOUD}/buckets/{url.removeprefix('gs://')}"
    bucket = f"{CLOUD}/buckets/{url.removeprefix('gs://').split('/')[0]}"
    if not os.path.isdir(bucket):
        fail(f"ERROR: (gcloud.storage) {bucket.rpartition('/')[2]} not found: 404.")
    if os.path.exists(f"{bucket}/.read-only"):
        fail("ERROR: (gcloud.storage.cp) HTTPError 403: me does not have storage.objects.create access to the bucket.")
    return path


def generation(path):
    try:
        with open(f"{path}.generation") as file:
            return int(file.read())
    except FileNotFoundError:
        return 0


def cp(state, script, positionals, options):
    source, target = positionals
    if source.startswith("gs://"):
        raise SystemExit(download(positionals[:-1], target))
    path = local(target)
    if os.environ.get("FAKE_READ_ONLY"):  # of a host
        fail("ERROR: (gcloud.storage.cp) HTTPError 403: a@b does not have storage.objects.create access to the bucket.")
    wanted = options.get("--if-generation-match")
    if wanted is not None and int(wanted) != (generation(path) if os.path.exists(path) else 0):
        fail("ERROR: (gcloud.storage.cp) HTTPError 412: At least one of the pre-conditions you specified did not hold.")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    import shutil

    new = generation(path) + 1 if generation(path) else time.time_ns()
    # Whole or not at all, should this process be killed.
    if source == "-":
        with open(f"{CLOUD}/upload", "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
    else:
        shutil.copyfile(source, f"{CLOUD}/upload")
    with open(f"{CLOUD}/upload.generation", "w") as file:
        file.write(str(new))
    os.replace(f"{CLOUD}/upload.generation", f"{path}.generation")
    os.replace(f"{CLOUD}/upload", path)


def cp_many(state, script, positionals, options):
    if len(positionals) == 2:
        return cp(state, script, positionals, options)
    return lambda: download(positionals[:-1], positionals[-1])


def download(urls, target):
    import shutil

    for url in urls:
        if not os.path.isfile(local(url)):
            fail(f"ERROR: (gcloud.storage.cp) The following URLs matched no objects or files:\n{url}")
        shutil.copyfile(local(url), os.path.join(target, os.path.basename(url)) if os.path.isdir(target) else target)
    return 0


def cat(state, script, positionals, options):
    for url in positionals:
        paths = [local(url)] if os.path.isfile(local(url)) else []
        if "*" in url:
            import glob

            paths = [path for path in sorted(glob.glob(local(url))) if not path.endswith(".generation")]
        if not paths:
            fail(f"ERROR: (gcloud.storage.cat) The following URLs matched no objects or files:\n{url}")
        for path in paths:
            with open(path, "rb") as file:
                content = file.read()
            if "--range" in options:
                start, _, end = options["--range"].partition("-")
                content = content[int(start) : int(end) + 1]
            sys.stdout.buffer.write(content)
    sys.stdout.flush()


def ls(state, script, positionals, options):
    folder = local(positionals[0])
    names = (
        sorted(name for name in os.listdir(folder) if not name.endswith(".generation")) if os.path.isdir(folder) else []
    )
    if not names:
        fail("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
    print("\n".join(positionals[0] + name for name in names))


def object_describe(state, script, positionals, options):
    if not os.path.isfile(local(positionals[0])):
        fail(f"ERROR: (gcloud.storage.objects.describe) gs://{positionals[0]} not found: 404.")
    if "update_time" in options["--format"]:
        print(time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(os.path.getmtime(local(positionals[0])))))
        return
    print(generation(local(positionals[0])))


def rsync(state, script, positionals, options):
    if not os.path.isdir(local(positionals[0])):
        fail(f"ERROR: (gcloud.storage.rsync) The following URLs matched no objects or files:\n{positionals[0]}")
    import shutil

    ignore = shutil.ignore_patterns("*.generation")
    shutil.copytree(local(positionals[0]), positionals[1], dirs_exist_ok=True, ignore=ignore)


def secret(state, script, positionals, options):
    name = f"projects/{options['--project']}/secrets/{options['--secret']}/versions/{positionals[0]}"
    if name not in script.get("secrets", {}):
        fail(f"ERROR: (gcloud.secrets.versions.access) PERMISSION_DENIED: Permission denied on resource {name}.")
    print(script["secrets"][name])


ACTIONS = {
    "auth list": auth_list,
    "config get": config_get,
    "projects get-iam-policy": iam_policy,
    "compute tpus accelerator-types describe": accelerator,
    "compute tpus queued-resources create": create,
    "compute tpus queued-resources describe": describe,
    "compute tpus queued-resources delete": delete,
    "compute tpus tpu-vm describe": node_describe,
    "compute tpus tpu-vm ssh": ssh,
    "alpha compute tpus tpu-vm ssh": ssh,
    "storage cat": cat,
    "storage cp": cp_many,
    "storage ls": ls,
    "storage objects describe": object_describe,
    "storage rsync": rsync,
    "secrets versions access": secret,
}
