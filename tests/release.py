"""Build the wheel and the source archive, and try the wheel in fresh environments, one for each version of Python.

    python tests/release.py                                # python3.10 to python3.13, where they are on PATH
    python tests/release.py --python PATH [PATH ...]       # these interpreters
    python tests/release.py --build_only                   # builds and checks the two files

Every interpreter gets the tested versions of constraints.txt, and the last one also an environment with the newest versions.
Each environment is removed before the next one is made; one with torch for CUDA takes 6 GB. `--dist` keeps the two files.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = [f"python3.{minor}" for minor in range(10, 14)]
# Nothing of the calling environment leads to another hf_efcp, or makes the build say that it does not compile.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "HF_EFCP")}


def call(*command: object, cwd: Path | None = None) -> str:
    """Run a command; return what it prints, or end the script with it where the command fails."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        print(" ".join(map(str, command)), f"exit status {done.returncode}", done.stdout, done.stderr, sep="\n", flush=True)
        sys.exit("failed; removing the environment takes a while")
    return done.stdout + done.stderr


def environment(python: str, folder: Path, *packages: object) -> Path:
    """Make a virtual environment with packages in an empty folder; return its folder of programs."""
    call(python, "-m", "venv", folder)
    call(folder / "bin/python", "-m", "pip", "install", "-q", *packages)
    return folder / "bin"


def build(scratch: Path) -> Path:
    """Build both files from the tracked files alone, with `python -m build`; return the wheel. A warning ends the script."""
    for name in call("git", "ls-files", cwd=ROOT).splitlines():
        (scratch / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, scratch / "tree" / name)
    programs = environment(sys.executable, scratch / "tools", "build", "twine")
    said = call(programs / "python", "-m", "build", "--outdir", scratch / "dist", cwd=scratch / "tree")
    if warnings := [line for line in said.splitlines() if re.search("warning|deprecat", line, re.IGNORECASE)]:
        sys.exit("the build warns:\n" + "\n".join(warnings))
    files = sorted((scratch / "dist").iterdir())
    call(programs / "twine", "check", "--strict", *files)
    print("built without a warning:", ", ".join(f.name for f in files), flush=True)
    return next(f for f in files if f.suffix == ".whl")


def attempt(python: str, wheel: Path, scratch: Path, constraints: tuple[object, ...]) -> None:
    """Install the wheel alone, and train with it in an empty folder."""
    programs = environment(python, scratch / "fresh", *constraints, f"{wheel}[cpu]")
    call(programs / "python", "-m", "pip", "check")
    shutil.copy(ROOT / "tests/release_smoke.py", scratch / "elsewhere")
    said = call(programs / "python", "release_smoke.py", wheel.name.split("-")[1], cwd=scratch / "elsewhere")
    assert "efcp_lowrank_mfac" in call(programs / "hf-efcp", "estimate", "minilm", cwd=scratch / "elsewhere")
    print(re.search("^works: .*", said, re.MULTILINE)[0], "(tested versions)" if constraints else "(newest versions)", flush=True)
    shutil.rmtree(scratch / "fresh")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", metavar="PATH", help="interpreters to try (default: python3.10 to python3.13)")
    parser.add_argument("--build_only", action="store_true", help="build and check the two files, and try no interpreter")
    parser.add_argument("--dist", type=Path, metavar="FOLDER", help="keep the two files in this folder")
    args = parser.parse_args()
    missing = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "elsewhere").mkdir()
        wheel = build(scratch)
        if args.dist:
            shutil.copytree(wheel.parent, args.dist, dirs_exist_ok=True)
        found = []
        for python in [] if args.build_only else args.python or PYTHONS:
            runs = subprocess.run([python, "-V"], capture_output=True) if shutil.which(python) else None
            (found if runs and runs.returncode == 0 else missing).append(python)
        for python in found:
            attempt(python, wheel, scratch, ("-c", ROOT / "constraints.txt"))
        if found:
            attempt(found[-1], wheel, scratch, ())
    if missing:
        print("not tried, because there is no such interpreter:", ", ".join(missing))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
