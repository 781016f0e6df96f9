"""The command line: every value is checked before it is used anywhere."""

import dataclasses
import re
from pathlib import Path

from .. import slices
from .terminal import UsageError, quoted

ROOT = Path(__file__).resolve().parents[2]

_SLICE = (
    "--name --type --zone --project --bucket --slices --workdir --data --spot --reserved --on-demand --max-attempts"
)
_NETWORK = "--network --subnetwork --service-account --internal-ips --tunnel-through-iap --runtime-version"
# What each command takes: an option that would be ignored is a mistake.
ALLOWED = {
    "submit": f"{_SLICE} {_NETWORK} --valid-until --max-hours --price --no-plan --watch --detach --dry-run --take-over "
    "--yes --max-cost --notify --zones --types --env --secret",
    "render-jobset": f"{_SLICE} --image --namespace --queue --kubernetes-account --env --secret",
    "logs": "--name --bucket --host --attempt --tail -f",
    "ssh": "--name --bucket --host --forward",
    "delete": "--name --bucket --yes",
    "attach": "--name --bucket --take-over --notify",
    "status": "--name --bucket",
    "stop": "--name --bucket",
    "tensorboard": "--name --bucket",
    "list": "--bucket",
}
TIERS = ("spot", "reserved", "on-demand")
SWITCHES = (
    "--internal-ips",
    "--tunnel-through-iap",
    "--no-plan",
    "--watch",
    "--detach",
    "--dry-run",
    "--take-over",
    "--yes",
    "-f",
)

NAME = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"
ZONE = r"[a-z]+-[a-z]+[0-9]+-[a-z]"
PROJECT = r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]"
BUCKET = r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[A-Za-z0-9_][A-Za-z0-9._-]*)*"
FOLDER = rf"{BUCKET}|(/[A-Za-z0-9_.-]+)+"
PRICE = r"[0-9]{1,4}(\.[0-9]{1,6})?"
DURATION = r"([0-9]{1,5}[smhd])+"
ZONES, TYPES = rf"{ZONE}(,{ZONE})*", r"[a-z0-9-]+(,[a-z0-9-]+)*"
NETWORK = r"[a-z][a-z0-9/_.-]*"
RUNTIME = r"[a-z0-9][a-z0-9._-]*"
EMAIL = r"[A-Za-z0-9][A-Za-z0-9._-]*@[a-z0-9.-]+"
# What nobody wants to find in a bucket: private keys, and tokens that say by themselves what they are. For Python and
# for git grep -E alike.
SECRET = (
    r'BEGIN [A-Z ]*PRIVATE[ ]KEY|"private[_]key"|(hf|ghp|gho|ghs|ghu)_[A-Za-z0-9]{30,}|github[_]pat_[A-Za-z0-9_]{30,}'
    r"|AKIA[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{35}|(^|[^A-Za-z0-9_-])sk-[A-Za-z0-9_-]{32,}"
)
SECRET_NAME = re.compile(r"(token|secret|passw(or)?d?|credential|api_?key)s?$", re.I)


def matches(value: str, pattern: str) -> bool:
    """The whole of it, on one line."""
    return re.fullmatch(pattern, value) is not None and "\n" not in value


@dataclasses.dataclass
class Options:
    """What was typed. Empty where nothing was."""

    command: str
    arguments: list[str]
    name: str = ""
    type: str = ""
    zone: str = ""
    project: str = ""
    bucket: str = ""
    tier: str = ""
    slices: str = "1"
    workdir: str = ""
    data: str = ""
    valid_until: str = ""
    network: str = ""
    subnetwork: str = ""
    service_account: str = ""
    max_attempts: str = "100"
    max_hours: str = "720"
    price: str = ""
    max_cost: str = ""
    notify: str = ""
    zones: str = ""
    types: str = ""
    host: str = ""
    attempt: str = ""
    tail: str = ""
    image: str = ""
    namespace: str = ""
    queue: str = ""
    kubernetes_account: str = ""
    runtime_version: str = ""
    forward: str = ""
    env: list[str] = dataclasses.field(default_factory=list)  # each NAME=VALUE
    secret: list[str] = dataclasses.field(default_factory=list)  # each NAME=SECRET
    internal_ips: bool = False
    tunnel_through_iap: bool = False
    no_plan: bool = False
    watch: bool = False
    detach: bool = False
    dry_run: bool = False
    take_over: bool = False
    yes: bool = False
    follow: bool = False
    trainer: list[str] = dataclasses.field(default_factory=list)  # what follows --


def parse(command: str, arguments: list[str]) -> Options:
    """Raises UsageError at an option that the command does not take, and at a value that is missing."""
    options = Options(command, arguments)
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--":
            options.trainer = words
            break
        option, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        takes_value = option.startswith("--") and option not in SWITCHES and option[2:] not in TIERS
        if takes_value and not equals and hasattr(options, _field(option)):
            if not words:
                raise UsageError(f"{option} needs a value")
            value = words.pop(0)
        if option == "--config" or option.startswith("--config."):
            raise UsageError(f"{quoted(word)} is the trainer's; its flags follow --, after all of {command}'s")
        if option not in ALLOWED[command].split():
            raise UsageError(f"{command} has no option {quoted(option)}; see launch/tpu_pod.sh help")
        _set(options, option, value)
    if options.detach:
        options.watch = True
    _first_of_several(options)
    return options


def _field(option: str) -> str:
    return "follow" if option == "-f" else option.removeprefix("--").replace("-", "_")


def _set(options: Options, option: str, value: str) -> None:
    if option[2:] in TIERS:
        if options.tier not in ("", option[2:]):
            raise UsageError(f"--{options.tier} and {option} exclude each other; choose one")
        options.tier = option[2:]
    elif option in SWITCHES:
        setattr(options, _field(option), True)
    elif option in ("--env", "--secret"):  # as often as they are given
        getattr(options, _field(option)).append(value)
    else:
        setattr(
            options, _field(option), value.rstrip("/") if _field(option) in ("bucket", "workdir", "data") else value
        )


def check_name(name: str) -> None:
    if not matches(name, NAME):
        raise UsageError(
            f"--name={quoted(name)} must be 1 to 40 of a-z, 0-9 and -, start with a letter and end without -; "
            "choose another"
        )


def check_bucket(bucket: str) -> None:
    if not matches(bucket, BUCKET):
        raise UsageError(
            f"--bucket={quoted(bucket)} is not gs://BUCKET or gs://BUCKET/FOLDER; give the bucket that keeps the run"
        )


# Field, pattern, what is wrong with a value that does not match; those that may be missing are the last ones.
_NEEDED = (
    ("zone", ZONE, "is not a zone; e.g. --zone us-central2-b"),
    ("project", PROJECT, "is not a project id; gcloud projects list shows yours"),
    ("slices", r"[1-9][0-9]{0,2}", "must be a whole number from 1 to 999"),
    ("max_attempts", r"[1-9][0-9]{0,3}", "must be a whole number from 1 to 9999"),
    ("max_hours", r"[1-9][0-9]{0,4}", "must be a whole number of hours, at least 1"),
)
_OPTIONAL = (
    ("max_cost", r"[0-9]{1,7}", "must be whole dollars, e.g. --max-cost 500"),
    ("price", PRICE, "must be dollars per chip and hour, e.g. --price 1.25"),
    ("valid_until", DURATION, "is not a duration; e.g. --valid-until 6h"),
    ("runtime_version", RUNTIME, "is not the name of a VM image; e.g. --runtime-version tpu-ubuntu2204-base"),
    ("network", NETWORK, "is not a network's name"),
    ("subnetwork", NETWORK, "is not a subnetwork's name"),
    ("service_account", EMAIL, "is not the e-mail address of a service account"),
)


def check(options: Options) -> None:
    """Everything of submit and render-jobset that can be checked without asking anybody; fills in what follows from it.

    Raises:
      UsageError: the first value that is wrong.
    """
    if not options.name:
        raise UsageError("--name is missing; give the run a name, e.g. --name c4-d12")
    check_name(options.name)
    for name in options.types.split(",") if options.types else [options.type]:
        try:
            slices.find(name)
        except ValueError as error:
            raise UsageError(
                f"--type={quoted(name)} is not a slice type; e.g. v4-8, v4-32, v5p-16, v5litepod-16 or v6e-16"
            ) from error
    for field, pattern, words in (*_NEEDED, *_OPTIONAL):
        value = getattr(options, field)
        optional = (field, pattern, words) in _OPTIONAL
        if not (optional and value == "") and not matches(value, pattern):
            raise UsageError(f"--{field.replace('_', '-')}={quoted(value)} {words}")
    check_bucket(options.bucket)
    if not options.tier:
        raise UsageError("say how the slice is paid for: --spot, --reserved or --on-demand (the full price)")
    config = _check_trainer(options.trainer)
    run_url = f"{options.bucket}/runs/{options.name}"
    options.workdir = options.workdir or f"{run_url}/workdir"
    # A dataset per family of configs: configs/c4.py trains on BUCKET/data/c4 unless told otherwise.
    options.data = options.data or f"{options.bucket}/data/{Path(config).name.removesuffix('.py')}"
    if not matches(options.workdir, FOLDER):
        raise UsageError(
            f"--workdir={quoted(options.workdir)} must be gs://BUCKET/FOLDER, or an absolute path that all hosts share"
        )
    if not matches(options.data, FOLDER):
        raise UsageError(
            f"--data={quoted(options.data)} must be gs://BUCKET/FOLDER of a prepared dataset, or "
            "a path that all hosts have"
        )


def _first_of_several(options: Options) -> None:
    """Of --zones and --types, which are tried in turn, the first is the one to begin with."""
    for one, several, pattern in (("zone", "zones", ZONES), ("type", "types", TYPES)):
        value = getattr(options, several)
        if value and not matches(value, pattern):
            raise UsageError(f"--{several}={quoted(value)} must be names with commas between")
        if value:
            setattr(options, one, value.split(",")[0])


def _check_trainer(arguments: list[str]) -> str:
    """Of what follows --: flags of the trainer alone. They are stored, so no secret may be among them.

    Returns:
      The file of --config.
    """
    if not arguments:
        raise UsageError("nothing follows --; give the trainer's flags, e.g. -- --config=configs/c4.py:d12")
    config = ""
    for argument in arguments:
        if re.search(r"[\x00-\x1f\x7f]", argument):
            raise UsageError(f"{quoted(argument)} holds a control character; give each flag on one line")
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--") or not equals:
            raise UsageError(f"{quoted(argument)} is not a flag of the trainer; write --flag=value, in one word")
        if flag == "--config":
            config = value.partition(":")[0]
        elif flag == "--workdir":
            raise UsageError("--workdir belongs before --; by default it is in the bucket")
        elif flag == "--config.data.path":
            raise UsageError("give the dataset as --data gs://BUCKET/FOLDER before --, not as --config.data.path")
        advice = "looks like a secret; flags are stored and logged, so the trainer must read it elsewhere"
        if re.search(SECRET, argument):
            raise UsageError(f"the value of {flag} {advice}")
        # A number is no secret: --config.data.tokens=5 is how much to train on.
        if SECRET_NAME.search(flag.removeprefix("--")) and not re.fullmatch(r"[0-9.e+_-]*", value):
            raise UsageError(f"{flag} {advice}")
    if not config:
        raise UsageError("the trainer's flags hold no --config=FILE, e.g. -- --config=configs/c4.py:d12")
    if not (ROOT / config).is_file():
        raise UsageError(f"--config: there is no file {config} in the repository; e.g. --config=configs/c4.py:d12")
    return config
