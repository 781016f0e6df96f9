"""The hashes of all packages that a host of a slice installs, beside the versions of constraints.txt.

make lock    # writes launch/packages.txt anew, by what the package index has; needs uv
"""

import subprocess
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What builds the project's own packages on a host, and what makes its environment.
BUILD = ("setuptools", "uv")
PROJECTS = ("./model/selective_attention", "./model/inference_budget", ".[tpu,gcs]")


def lines(lock: dict[str, list[dict[str, object]]]) -> list[str]:
    """Each package of a pylock.toml as a line that pip requires; those without wheels are the project's own."""
    found = []
    for package in lock["packages"]:
        wheels = package.get("wheels", [])
        assert isinstance(wheels, list)
        hashes = sorted(f"--hash=sha256:{wheel['hashes']['sha256']}" for wheel in wheels)
        if hashes:
            found.append(f"{package['name']}=={package['version']} {' '.join(hashes)}")
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        wanted, lock = Path(folder) / "wanted.txt", Path(folder) / "pylock.toml"
        wanted.write_text("\n".join([*BUILD, *PROJECTS]) + "\n")
        # As the hosts are: Ubuntu 22.04 with a Python of its own.
        platform = ["--python-version=3.11", "--python-platform=x86_64-manylinux_2_34", "--only-binary=:all:"]
        command = [".venv/bin/uv", "pip", "compile", "--quiet", "--no-config", *platform, "--format=pylock.toml"]
        command += ["--constraint=constraints.txt", f"--output-file={lock}", str(wanted)]
        subprocess.run(command, cwd=ROOT, check=True)
        text = "\n".join(lines(tomllib.loads(lock.read_text())))
    head = "# Written by make lock: what a host of a slice installs, Linux on x86-64 with Python 3.11.\n"
    (ROOT / "launch/packages.txt").write_text(f"{head}{text}\n")


if __name__ == "__main__":
    main()
