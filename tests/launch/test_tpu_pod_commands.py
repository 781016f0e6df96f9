"""What submit prints and refuses before anything is created, and what gcloud takes."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT
from tests.support.cloud import SUBMIT, TRAINER, git, replaced

from .fake_gcloud import flags

GOLDEN = Path(__file__).parent / "golden"
REAL_GCLOUD = shutil.which("gcloud")
SDK_TABLE = Path("/usr/lib/google-cloud-sdk/data/cli/gcloud_completions.py")


KINDS = {"v4-8": 4}  # and their chips
FLAGS = ["--config=configs/c4.py:d12"]


@pytest.fixture(scope="module")
def preflights() -> dict[str, str]:
    """What launch.preflight says of a config on each kind of slice; one process, since its imports take seconds."""
    program = "import json, sys; from launch.preflight import describe; flags, *devices = sys.argv[1:]\n"
    program += "print(json.dumps({d: describe([flags], int(d), 1, 'gs://bucket/data/c4') for d in devices}))"
    command = [sys.executable, "-c", program, *FLAGS, *map(str, KINDS.values())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_dry_run_prints_every_command_and_calls_none(cloud, preflights, kind):
    for devices, text in preflights.items():
        (cloud.folder / f"preflight--devices={devices}--slices=1").write_text(text + "\n")
    code, output = cloud.run("submit", *replaced("--type", kind), "--dry-run", "--", *FLAGS)
    assert code == 0, output
    assert cloud.calls() == []
    assert output == (GOLDEN / f"{kind}-x1.txt").read_text()


def test_dry_run_of_two_slices_prints_the_hosts_of_both(cloud):
    options = [*replaced("--type", "v4-32"), "--slices", "2", "--dry-run", "--", *FLAGS]
    code, output = cloud.run("submit", *options, PYTHON=sys.executable)
    assert code == 0, output
    assert cloud.calls() == []
    assert output == (GOLDEN / "v4-32-x2.txt").read_text()


BAD = {
    "no name": (SUBMIT[2:], TRAINER, "--name is missing"),
    "name that is a command": (replaced("--name", "a;reboot"), TRAINER, "must be 1 to 40 of"),
    "unknown type of several": ([*SUBMIT, "--types", "v4-16,v99"], TRAINER, "--type='v99' is not a slice type"),
    "trainer's flag too early": (
        [*SUBMIT, "--config=configs/demo.py"],
        [],
        "its flags follow --, after all of submit's",
    ),
    "flag in two words": (SUBMIT, ["--", "--config", "configs/demo.py"], "write --flag=value, in one word"),
    "unknown type": (replaced("--type", "v4-33"), TRAINER, "is not a slice type"),
    "not a zone": (replaced("--zone", "$(id)"), TRAINER, "is not a zone"),
    "not a project": (replaced("--project", "P!"), TRAINER, "is not a project id"),
    "not a bucket": (replaced("--bucket", "bucket"), TRAINER, "is not gs://BUCKET"),
    "no tier": ([o for o in SUBMIT if o != "--spot"], TRAINER, "say how the slice is paid for"),
    "two tiers": ([*SUBMIT, "--reserved"], TRAINER, "exclude each other"),
    "no slices": ([*SUBMIT, "--slices", "0"], TRAINER, "must be a whole number"),
    "not a duration": ([*SUBMIT, "--valid-until", "soon"], TRAINER, "is not a duration"),
    "unknown option": ([*SUBMIT, "--sport"], TRAINER, "has no option"),
    "no flags": (SUBMIT, [], "nothing follows --"),
    "no such config": (SUBMIT, ["--", "--config=configs/c5.py"], "there is no file configs/c5.py"),
    "workdir twice": (SUBMIT, [*TRAINER, "--workdir=/x"], "--workdir belongs before --"),
    "a secret": (SUBMIT, [*TRAINER, "--wandb_api_key=x"], "looks like a secret"),
    "a token": (SUBMIT, [*TRAINER, "--config.note=hf_" + 34 * "x"], "the value of --config.note looks like a secret"),
    "no dataset": ([*SUBMIT, "--data", "gs://bucket/nothing"], TRAINER, "holds no manifest.json"),
    "value without a name": ([*SUBMIT, "--env", "=x"], TRAINER, "must be NAME=VALUE"),
    "name without a value": ([*SUBMIT, "--env", "A"], TRAINER, "must be NAME=VALUE"),
    "the launcher's own": ([*SUBMIT, "--env", "PATH=/x"], TRAINER, "--env=PATH is set by the launcher itself"),
    "name twice": ([*SUBMIT, "--env", "A=1", "--secret", "A=x"], TRAINER, "--env=A is given twice"),
    "value of two lines": ([*SUBMIT, "--env", "A=1\nsecret B=c"], TRAINER, "--env=A holds a control character"),
    "secret in the open": ([*SUBMIT, "--env", "WANDB_API_KEY=x"], TRAINER, "give --secret WANDB_API_KEY=ID"),
    "secret of no manager": ([*SUBMIT, "--secret", "A=p/q"], TRAINER, "--secret=A names no secret of Secret Manager"),
    "no such bucket": (replaced("--bucket", "gs://other"), TRAINER, "does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_anything_is_created(cloud, name):
    options, trainer, words = BAD[name]
    code, output = cloud.run("submit", *options, *trainer)
    assert code == 2 and words in output and output.count("error: ") == 1, output
    assert [line for line in output.splitlines() if not line.startswith("error: ") and "git" not in line] == []
    assert not cloud.calls("create") and cloud.state()["created"] == 0


def test_help_is_given_wherever_it_is_asked_for(cloud):
    assert cloud.run("submit", "--help") == cloud.run("help")


def test_not_logged_in_is_said(cloud):
    cloud.script["account"] = ""
    cloud.host()
    assert cloud.submit() == (2, "error: gcloud has no account; run gcloud auth login\n")


def test_type_that_the_zone_lacks_is_said(cloud):
    code, output = cloud.run("submit", *replaced("--type", "v5p-8"), *TRAINER)
    assert code == 2 and "zone us-central2-b has no v5p-8" in output


def test_plan_that_does_not_fit_ends_it_with_the_plan(cloud):
    (cloud.folder / "plan").write_text("  total   48.12   does NOT fit 30.75\n")
    (cloud.folder / "plan.code").write_text("3")
    code, output = cloud.submit()
    assert code == 2 and "does NOT fit 30.75\nerror: by the plan this config does not fit 1 x v4-16" in output
    assert not cloud.calls("create")


def test_plan_that_cannot_be_made_says_why_and_how_to_go_on_without(cloud):
    (cloud.folder / "plan.stderr").write_text(
        "error: the TPU compiler is not installed; run: pip install -e '.[tpu]'\n"
    )
    (cloud.folder / "plan.code").write_text("2")
    code, output = cloud.submit()
    reason = "the TPU compiler is not installed; run: pip install -e '.[tpu]'; mend it, or --no-plan"
    assert code == 2 and f"error: launch.plan failed (exit code 2): {reason}\n" in output


def test_plan_is_made_once_for_one_code_and_one_set_of_flags(cloud):
    cloud.error("queued-resources create", "ERROR: (gcloud) INVALID_ARGUMENT: no", times=2)
    assert "asking the TPU compiler" in cloud.submit()[1]
    (cloud.folder / "plan.code").write_text("3")
    assert "the plan of an earlier submit says that it fits" in cloud.submit()[1]
    assert "does not fit" in cloud.run("submit", *replaced("--type", "v4-8"), "--watch", *TRAINER)[1]


@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("kind", "config", "code", "words"),
    [
        ("v4-32", ["d12"], 0, r"  total +\d+\.\d\d   fits: \d+% of 30.75 left\n"),
        pytest.param(
            "v4-8",
            ["d28", "--config.mesh.fsdp=4", "--config.batch_size=1024"],
            2,
            r"Does NOT fit: v4-8 is too small for this batch:\n  needs at least .* which has 30.75\n",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_plan_of_the_tpu_compiler_is_understood(cloud, kind, config, code, words):
    cloud.trainer("0")
    options = [*replaced("--type", kind), "--watch", "--data", "/data/c4", "--", f"--config=configs/c4.py:{config[0]}"]
    process = cloud.start("submit", *options, *config[1:], PYTHON=sys.executable)
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == code and re.search(words, output), output


@pytest.fixture(scope="module")
def sdk_tree():
    spec = importlib.util.spec_from_file_location("gcloud_completions", SDK_TABLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.STATIC_COMPLETION_CLI_TREE


@pytest.mark.skipif(not SDK_TABLE.exists(), reason="no installation of the Google Cloud SDK")
@pytest.mark.parametrize("command", flags.COMMANDS)
def test_table_of_flags_is_that_of_the_installed_sdk(sdk_tree, command):
    node = sdk_tree
    for word in command.split():
        node = node["commands"][word]
    assert flags.COMMANDS[command]["flags"] <= set(node["flags"])


@pytest.fixture
def changed(cloud, repository, tmp_path):
    """The cloud, and a checkout of its own that a test may change."""
    cloud.repository = tmp_path / "checkout"
    shutil.copytree(repository, cloud.repository)
    return cloud


def test_uncommitted_changes_are_part_of_the_run_and_recorded_but_not_untracked_files(changed):
    changed.trainer("0")
    with (changed.repository / "trainer/loop.py").open("a") as file:
        file.write("# changed\n")
    (changed.repository / "key.json").write_text("{}")
    code, output = changed.submit()
    assert code == 0, output
    assert "1 files that git does not track are not part of the run" in output
    assert "uncommitted changes are part of the run and recorded with it" in output
    uploaded = changed.folder / "buckets/bucket/runs/run/code"
    (patch,), (archive,) = uploaded.glob("*.patch"), uploaded.glob("*.tar.gz")
    assert "+# changed" in patch.read_text()
    with tarfile.open(archive) as files:
        assert files.extractfile("trainer/loop.py").read().endswith(b"# changed\n")
        assert "key.json" not in files.getnames()


KEY = "-----BEGIN RSA PRIVATE " + "KEY-----\nMIIEpAIBAAKCAQEA\n"


def test_private_key_in_git_is_never_uploaded(changed):
    (changed.repository / "configs/key.pem").write_text(KEY)
    git(changed.repository, "add", "-A")
    code, output = changed.submit()
    assert (
        code == 2 and "configs/key.pem holds a key or token, which must not be uploaded; take it out of git" in output
    )
    # Taken out without a commit it would be in the recorded patch.
    git(changed.repository, "commit", "-q", "-m", "key")
    (changed.repository / "configs/key.pem").unlink()
    code, output = changed.submit()
    assert code == 2 and "the uncommitted changes take a key or token out" in output
    assert not (changed.folder / "buckets/bucket/runs/run/code").exists()


@pytest.mark.parametrize("line", ["NAME=--flags-file=/etc/passwd", "SLICES=a[$(id)]", "ZONE=x y", "TYPE=v4-$(id)"])
def test_record_in_the_bucket_that_no_submit_wrote_is_refused(cloud, line):
    good = {"NAME": "run", "PROJECT": "my-project", "ZONE": "us-central2-b", "TYPE": "v4-16", "SLICES": "1"}
    good |= {"TIER": "spot", "BUCKET": "gs://bucket", "MAX_HOURS": "1", "MAX_ATTEMPTS": "1"}
    key, _, value = line.partition("=")
    cloud.put("run", "".join(f"{k}={v}\n" for k, v in (good | {key: value}).items()))
    code, output = cloud.run("status", "--name", "run", "--bucket", "gs://bucket")
    assert code == 2 and f"holds {key}='{value}', which no submit wrote" in output
    assert [call for call in cloud.calls() if "tpus" in call] == []


def dry_run_calls() -> list[list[str]]:
    """One call of each form in the dry runs, and those that no dry run shows."""
    place = ["--project=my-project", "--zone=us-central2-b"]
    calls = [
        [*["compute", "tpus", "queued-resources", "create", "run", *place, "--accelerator-type=v4-8", "--quiet"],
         *["--runtime-version=tpu-ubuntu2204-base", "--node-id=run", "--reserved", "--valid-until-duration=6h"],
         *["--network=n", "--subnetwork=s", "--service-account=a@b.iam.gserviceaccount.com", "--internal-ips"]],
        ["compute", "tpus", "tpu-vm", "ssh", "run", *place, "--worker=1", "--internal-ip"],
        ["compute", "tpus", "tpu-vm", "ssh", "run", *place, "--worker=1", "--", "-L", "9012:localhost:9012"],
        ["alpha", "compute", "tpus", "tpu-vm", "ssh", "run", *place, "--worker=1", "--tunnel-through-iap"],
        ["storage", "cat", "--range=4-7", "gs://bucket/log"],
        ["storage", "objects", "describe", "gs://bucket/watch", "--format=value(generation)"],
        ["storage", "ls", "gs://bucket/runs/run/attempts/1/logs/host-0/"],
        ["secrets", "versions", "access", "latest", "--secret=s", "--project=my-project"],
        ["storage", "rsync", "--recursive", "--quiet", "gs://bucket/tensorboard", "/tmp"],
    ]  # fmt: skip
    lines = "".join((GOLDEN / f"{name}.txt").read_text() for name in ("v4-8-x1", "v4-32-x2")).splitlines()
    calls += [shlex.split(line)[1:] for line in lines if line.startswith("gcloud ") and "auth list" not in line]
    forms = {(flags.split(call)[0], *sorted(a.partition("=")[0] for a in call if a[0] == "-")): call for call in calls}
    return list(forms.values())


@pytest.mark.slow
@pytest.mark.skipif(not REAL_GCLOUD, reason="no installation of the Google Cloud SDK")
def test_real_gcloud_takes_every_call_up_to_the_login(tmp_path):
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path)}
    environment |= {"CLOUDSDK_CORE_CHECK_GCE_METADATA": "false", "https_proxy": "http://127.0.0.1:9"}  # nothing leaves

    (tmp_path / "watchdog.sh").touch()

    def said(call: list[str]) -> str:
        command = [REAL_GCLOUD, *call]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        return done.stderr

    assert "unrecognized arguments: --sport" in said([*dry_run_calls()[0], "--sport"])
    for call in dry_run_calls():
        assert "You do not currently have an active account selected" in said(call), call


def test_messages_of_the_readme_are_those_of_the_scripts():
    table = (ROOT / "docs/tpu.md").read_text().partition("## When something goes wrong")[2].partition("##")[0]
    messages = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    scripts = "".join(path.read_text() for kind in ("*.sh", "pod/*.py") for path in (ROOT / "launch").rglob(kind))
    assert len(messages) > 15
    for message in messages:
        # What stands for a value, and the quotation of a service's own words
        fixed = max(re.split(r"\.\.\.|N: setup|\bN\b|6h|FAILED: 13", message), key=len).strip(" :")
        assert fixed in scripts or not fixed, message


def test_jobset_has_a_pod_for_every_host_and_fails_for_good_on_mistakes_alone(cloud):
    options = [*replaced("--type", "v4-32"), "--slices", "2", "--image", "registry/trainer:1"]
    code, output = cloud.run("render-jobset", *options, *TRAINER, "--config.data.note='x': y")
    assert code == 0, output
    job = yaml.safe_load(output)["spec"]["replicatedJobs"][0]
    slice_, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    assert (job["replicas"], slice_["parallelism"], slice_["completions"], slice_["backoffLimit"]) == (2, 4, 4, 0)
    assert slice_["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 3, 4, 5]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x4"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert "--config.data.note='x': y" in pod["containers"][0]["args"]
    assert "serviceAccountName" not in pod and "namespace" not in yaml.safe_load(output)["metadata"]


def test_jobset_hands_the_environment_on(cloud):
    options = [*SUBMIT, "--image", "registry/trainer:1", "--env", "A='x': {y}", "--env", "B="]
    options += ["--secret", "TOKEN=wandb:api.key"]
    code, output = cloud.run("render-jobset", *options, *TRAINER)
    assert code == 0, output
    pod = yaml.safe_load(output)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    secret = {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "api.key"}}}
    assert pod["containers"][0]["env"][1:] == [{"name": "A", "value": "'x': {y}"}, {"name": "B", "value": ""}, secret]
    code, output = cloud.run("render-jobset", *SUBMIT, "--image", "i", "--secret", "A=hf_abc", *TRAINER)
    assert (code, output) == (2, "error: --secret=A names no key of a Kubernetes secret; give A=SECRET:KEY\n")


def test_jobset_goes_to_the_namespace_queue_and_account_that_are_given(cloud):
    options = [*SUBMIT, "--image", "registry/trainer:1", "--namespace", "research", "--queue", "tpus"]
    code, output = cloud.run(
        "render-jobset", *options, "--kubernetes-account", "trainer", *TRAINER, "--config.note=a&b"
    )
    assert code == 0, output
    job = yaml.safe_load(output)
    assert job["metadata"]["namespace"] == "research"
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "trainer" and "--config.note=a&b" in pod["containers"][0]["args"]


def test_number_is_no_secret_and_tokens_of_more_services_are(cloud):
    code, output = cloud.run("submit", *SUBMIT, "--dry-run", *TRAINER, "--config.data.tokens=5")
    assert code == 0, output
    for token in ("gho_" + 36 * "x", "github" + "_pat_" + 40 * "x", "AI" + "za" + 35 * "x", "sk-" + 40 * "x"):
        code, output = cloud.run("submit", *SUBMIT, "--dry-run", *TRAINER, f"--config.note={token}")
        assert code == 2 and "the value of --config.note looks like a secret" in output
