# ruff: noqa: E501
"""What gcloud accepts of the commands that the launcher uses, and where that was read.

SDK: the source of Google Cloud SDK 528.0.0 (the public reference pages are made from the same files); a table of it
comes with each installation, against which `test_tpu_pod_commands.py` holds this one where there is an installation.
"""

# Read in lib/surface/...; beside each the file.
COMMANDS: dict[str, dict[str, object]] = {
    "auth list": {
        "source": "surface/auth/list.py",
        "positionals": 0,
        "flags": {"--filter-account", "--filter", "--limit", "--page-size", "--sort-by"},
    },
    "config get": {"source": "surface/config/get.py", "positionals": 1, "flags": set()},
    "projects get-iam-policy": {"source": "surface/projects/get_iam_policy.py", "positionals": 1, "flags": set()},
    "compute tpus accelerator-types describe": {
        "source": "surface/compute/tpus/accelerator_types/describe.yaml",
        "positionals": 1,
        "flags": {"--zone"},
    },
    "compute tpus queued-resources create": {
        "source": "surface/compute/tpus/queued_resources/create.yaml, command_lib/compute/tpus/queued_resources/flags.yaml",
        "positionals": 1,
        "flags": {
            "--accelerator-type", "--async", "--data-disk", "--description", "--guaranteed", "--internal-ips", "--labels",
            "--metadata", "--metadata-from-file", "--network", "--node-count", "--node-id", "--node-prefix", "--range",
            "--reservation-host-folder", "--reservation-host-organization", "--reservation-host-project", "--reserved",
            "--runtime-version", "--scopes", "--service-account", "--shielded-secure-boot", "--spot", "--subnetwork",
            "--tags", "--topology", "--type", "--valid-after-duration", "--valid-after-time", "--valid-until-duration",
            "--valid-until-time", "--zone",
        },
    },
    "compute tpus queued-resources describe": {
        "source": "surface/compute/tpus/queued_resources/describe.yaml",
        "positionals": 1,
        "flags": {"--zone"},
    },
    "compute tpus queued-resources delete": {
        "source": "surface/compute/tpus/queued_resources/delete.yaml",
        "positionals": 1,
        "flags": {"--zone", "--force", "--async"},
    },
    "compute tpus tpu-vm describe": {
        "source": "surface/compute/tpus/tpu_vm/describe.yaml",
        "positionals": 1,
        "flags": {"--zone"},
    },
    # GA: without --batch-size and --tunnel-through-iap, which are alpha only.
    "compute tpus tpu-vm ssh": {
        "source": "surface/compute/tpus/tpu_vm/ssh.py, command_lib/compute/tpus/tpu_vm/ssh.py",
        "positionals": 1,
        "flags": {
            "--command", "--dry-run", "--force-key-file-overwrite", "--internal-ip", "--output-directory", "--plain",
            "--ssh-flag", "--ssh-key-expiration", "--ssh-key-expire-after", "--ssh-key-file",
            "--strict-host-key-checking", "--worker", "--zone",
        },
    },
    "alpha compute tpus tpu-vm ssh": {
        "source": "surface/compute/tpus/tpu_vm/ssh.py",
        "positionals": 1,
        "flags": {"--command", "--internal-ip", "--ssh-flag", "--tunnel-through-iap", "--worker", "--zone"},
    },
    "storage cat": {
        "source": "surface/storage/cat.py",
        "positionals": 99,
        "flags": {"--additional-headers", "--decryption-keys", "--display-url", "--range"},
    },
    "storage cp": {
        "source": "surface/storage/cp.py, command_lib/storage/flags.py",
        "positionals": 999,
        "flags": {"--if-generation-match", "--if-metageneration-match", "--no-clobber", "--recursive"},
    },
    "storage ls": {"source": "surface/storage/ls.py", "positionals": 99, "flags": {"--long", "--recursive"}},
    "storage rsync": {
        "source": "surface/storage/rsync.py",
        "positionals": 2,
        "flags": {"--recursive", "--exclude", "--dry-run", "--delete-unmatched-destination-objects"},
    },
    "storage objects describe": {
        "source": "surface/storage/objects/describe.py",
        "positionals": 1,
        "flags": {"--additional-headers", "--decryption-keys", "--fetch-encrypted-object-hashes", "--raw", "--soft-deleted"},
    },
    "secrets versions access": {
        "source": "surface/secrets/versions/access.py",
        "positionals": 1,
        "flags": {"--location", "--out-file", "--secret"},
    },
}  # fmt: skip
# Of every command: calliope/cli.py and the gcloud-wide flags page.
GLOBAL = {"--account", "--configuration", "--filter", "--flags-file", "--flatten", "--format", "--help",
          "--impersonate-service-account", "--log-http", "--project", "--quiet", "--verbosity", "--version"}  # fmt: skip
SWITCHES = {"--async", "--force", "--guaranteed", "--internal-ip", "--internal-ips", "--plain", "--quiet", "--raw",
            "--recursive", "--reserved", "--shielded-secure-boot", "--spot", "--no-clobber", "--dry-run", "--tunnel-through-iap"}  # fmt: skip


def mistake(arguments: list[str]) -> str:
    """Why the real tool would refuse these arguments; empty if it would not."""
    command, rest = split(arguments)
    if command is None:
        return f"no such command: {' '.join(arguments[:5])}"
    spec = COMMANDS[command]
    flags, positionals = [], []
    for argument in rest[: rest.index("--")] if "--" in rest else rest:
        if argument.startswith("-") and argument != "-":
            name, equals, _ = argument.partition("=")
            if name not in spec["flags"] | GLOBAL:  # type: ignore[operator]
                return f"{command} has no flag {name}"
            if (name in SWITCHES) == bool(equals):
                return f"{command} {name}: a value where none goes, or the other way round"
            flags.append(name)
        else:
            positionals.append(argument)
    if len(positionals) > spec["positionals"]:  # type: ignore[operator]
        return f"{command}: unexpected {positionals[-1]!r}"
    if command.startswith("compute tpus") and not {"--zone", "--project"} <= set(flags):
        return f"{command} without --zone or --project depends on the configuration"
    return _create_mistake(flags, rest) if command.endswith("create") else ""


def _create_mistake(flags: list[str], rest: list[str]) -> str:
    if ("--node-id" in flags) == ("--node-count" in flags):
        return "exactly one of --node-id and --node-count"
    if ("--accelerator-type" in flags) == ("--type" in flags):
        return "exactly one of --accelerator-type and --type"
    if "--runtime-version" not in flags:
        return "--runtime-version is required"
    if "--node-prefix" in flags and "--node-count" not in flags:
        return "--node-prefix without --node-count"
    for argument in rest:
        if argument.startswith("--node-count=") and int(argument.partition("=")[2]) < 2:
            return "Node count must be greater than 1"
    return ""


def split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The command of COMMANDS that the arguments begin with, and the rest."""
    for length in range(6, 1, -1):
        if (command := " ".join(arguments[:length])) in COMMANDS:
            return command, arguments[length:]
    return None, arguments
