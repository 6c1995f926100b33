"""Rehearsal of the GPU job on this CPU with toy sizes, from packing the parcels to the returned results.

    python benchmarks/gpu/rehearse.py [--kill] [--work FOLDER]

It packs for the current Python, copies the files of the checkout and then one parcel after the other to an empty
folder, and runs the commands printed by `pack.py` there. The environment has only the packages of the GPU machine
(`machine.json`), linked from this environment and therefore in its versions. With `--kill` each phase is killed once;
the phases before it must not run again, and it must be resumed and complete.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]

from job import PHASES  # noqa: E402
from packaging.requirements import Requirement  # noqa: E402
from packaging.utils import canonicalize_name  # noqa: E402
from work import Work  # noqa: E402


def bare_environment(folder: Path, carried: set[str]) -> Path:
    """Create an environment with the packages of `machine.json` and without those `carried`; return its ``bin``."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    packages = json.loads((HERE / "machine.json").read_text(encoding="utf-8"))["packages"]
    allowed = _with_needs({canonicalize_name(name) for name in packages}) - carried
    for distribution in importlib.metadata.distributions():
        name = canonicalize_name(distribution.name)
        if name not in allowed:
            continue
        for top in {
            Path(file).parts[0] for file in distribution.files or () if Path(file).parts[0] not in ("..", "__pycache__")
        }:
            target = Path(str(distribution.locate_file(top)))
            if target.exists() and not (site / top).exists():
                (site / top).symlink_to(target)
    return folder / "bin"


def _with_needs(names: set[str]) -> set[str]:
    """Return `names` and their requirements in the versions installed here, which may differ from the machine's."""
    found, queue = set(names), list(names)
    while queue:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for text in importlib.metadata.requires(queue.pop()) or ():
                need = Requirement(text)
                name = canonicalize_name(need.name)
                if name not in found and (need.marker is None or need.marker.evaluate({"extra": ""})):
                    found.add(name)
                    queue.append(name)
    return found


def checkout(target: Path) -> None:
    """Copy the files of this working tree to `target`, without those that git ignores."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, path)


def give(command: str, folder: Path, out: Path, environment: dict[str, str]) -> str:
    """Run a command printed by `pack.py` in the copy of the checkout, and return its output."""
    print(f"\n$ {command}", flush=True)
    done = subprocess.run(
        command.replace("OUT", str(out)), shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )
    print(done.stdout[-1500:], done.stderr[-1500:], sep="", flush=True)
    if done.returncode:
        raise SystemExit(f"ended with status {done.returncode}")
    return done.stdout


def killed_in_each_phase(command: str, folder: Path, out: Path, environment: dict[str, str], work: Work) -> None:
    """Run a command once for each phase, and kill the phase and its driver while the phase runs."""
    for phase in PHASES:
        if work.done(phase) or ("--phases" in command and phase not in command):
            continue
        before = {name: work.result(name) for name in PHASES if work.done(name)}
        process = subprocess.Popen(
            command.replace("OUT", str(out)), shell=True, cwd=folder, env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        pid = _running("phase", phase, process)
        time.sleep(1.5)
        driver = _running("drive", str(work.root), process)
        for group in (process.pid, driver, pid):
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()
        print(f"killed in {phase}", flush=True)
        if any(work.result(name) != found for name, found in before.items()):
            raise SystemExit(f"a kill in {phase} changed the result of a phase that was done")


def _running(verb: str, word: str, process: subprocess.Popen[bytes]) -> int:
    """Wait for the process with these words in its command, and return its id; `process` started the job."""
    while process.poll() is None:
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = entry.read_bytes().split(b"\0")
            except OSError:
                continue
            if {verb.encode(), word.encode()} <= set(words):
                return int(entry.parent.name)
        time.sleep(0.1)
    raise SystemExit(f"the job ended before {verb} {word} ran")


def main() -> None:
    """Run the rehearsal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kill", action="store_true", help="kill each phase once")
    parser.add_argument("--work", type=Path, help="an empty folder; by default a temporary one, removed at the end")
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        root = (args.work or Path(scratch)).absolute()
        folder, out, home = root / "checkout", root / "out", root / "home"
        checkout(folder)
        home.mkdir()
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        packing = [sys.executable, str(HERE / "pack.py"), str(root / "parcels"), "--toy", "--python", version]
        printed = subprocess.run(packing, check=True, capture_output=True, text=True).stdout
        print(printed)
        commands = [line for line in printed.splitlines() if line.startswith("python3 ")]
        wheels = [line.split()[-1] for line in printed.splitlines() if line.startswith("wheel ")]
        carried = {canonicalize_name(name.partition("-")[0]) for name in wheels}
        binaries = bare_environment(root / "machine", carried)
        environment = {"PATH": f"{binaries}:/usr/bin:/bin", "HOME": str(home), "OMP_NUM_THREADS": "1"}
        work = Work(home / "robust-prune-gpu")
        for number, command in enumerate(commands, start=1):
            shutil.copytree(root / "parcels" / f"parcel-{number}", folder / "parcel")
            command = command.replace(str(root / "parcels" / f"parcel-{number}"), "parcel")
            taken, _, ran = command.partition(" && ")
            give(taken, folder, out, environment)
            for rest in filter(None, ran.split(" && ")):
                if args.kill:
                    killed_in_each_phase(rest, folder, out, environment, work)
                give(rest, folder, out, environment)
            shutil.rmtree(folder / "parcel")
        states = {phase: work.result(phase).get("status") for phase in PHASES}
        names = sorted(path.name for path in out.iterdir())
        print(states, names, f"{time.monotonic() - begin:.0f} s")
        if set(states.values()) != {"done"}:
            raise SystemExit("not every phase came to its end")
        print("rehearsed: every phase came to its end")


if __name__ == "__main__":
    main()
