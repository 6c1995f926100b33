"""Job on the GPU machine: unpacks parcels, runs its phases in the background, and copies their results.

    python3 benchmarks/gpu/job.py take PARCEL                    # once for each parcel, in any order
    python3 benchmarks/gpu/job.py run --out OUT --seconds 560    # repeatedly, until it reports that all is done

`run` starts the phases in a separate process group and watches them. After `--seconds` it copies the results so far to
OUT and returns, while the phases continue; the same command watches them again. Each phase runs in its own process with
a time budget and stores its results as it proceeds. It is not repeated once it is done, here or in
`benchmarks/results/gpu/`. A phase that fails does not affect the others. README.md lists the phases and their times.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import parcels  # noqa: E402
from sizes import GPU, TOY, Sizes  # noqa: E402
from work import Work  # noqa: E402

PHASES = ("facts", "latency", "speed", "base", "compression")
MOST_FILES, MOST_BYTES = 8, 15 * 2**20
GRACE = 1.25
"""Factor of its time budget after which a phase that does not end by itself is killed."""


def take(folder: Path, work: Work) -> None:
    """Copy one parcel, and install or unpack the files that are newly complete."""
    parcels.take(folder, work.root)
    marks = work.root / "installed"
    marks.mkdir(exist_ok=True)
    items = [item for item in parcels.read(folder)[1] if (work.items / item.name).exists()]
    new = [item for item in items if not (marks / f"{item.name}.{item.sha256}").exists()]
    wheels = [str(work.items / item.name) for item in new if item.kind == "wheel"]
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        command += ["--no-cache-dir", "--upgrade", "--target", str(work.root / "site")]
        _checked([*command, *wheels], "the wheels cannot be installed")
    for item in new:
        if item.kind == "skeletons":
            with zipfile.ZipFile(work.items / item.name) as archive:
                archive.extractall(work.root / "skeletons")
        elif item.kind == "images":
            command = [sys.executable, str(HERE / "images.py"), str(work.items / item.name), str(work.data)]
            _checked(command, f"{item.name} cannot be unpacked")
        elif item.kind == "base":
            shutil.copy(work.items / item.name, work.base)
    for item in new:
        (marks / f"{item.name}.{item.sha256}").touch()
    left = parcels.missing(folder, work.root)
    print(f"{folder.name} taken: {', '.join(item.name for item in new) or 'nothing whole yet'}. ", end="")
    print(f"Still incomplete: {', '.join(left)}." if left else "All files are there.")


def _checked(command: list[str], problem: str) -> None:
    if subprocess.run(command).returncode:
        raise SystemExit(f"{problem}: see above.")


def environment(work: Work) -> dict[str, str]:
    """Return the environment variables with which a phase finds the wheels, this checkout and the images."""
    paths = [str(work.root / "site"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    data = {} if not work.data.exists() else {"ROBUST_PRUNE_DATA": str(work.data)}
    return {**os.environ, **data, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def drive(work: Work, phases: list[str], toy: bool, lock: int) -> None:
    """Run the phases that are not done, each in its own process group; `watch` starts it in the background.

    `lock` is the descriptor of the lock file, which is locked while this job runs. Phases inherit it, so that a phase
    that outlives the driver is not started again.
    """
    sizes = _sizes(toy)
    for phase in phases:
        if work.done(phase):
            print(f"{phase}: done already", flush=True)
            continue
        command = [sys.executable, str(HERE / "job.py"), "phase", phase, "--work", str(work.root), *["--toy"] * toy]
        begin, budget = time.monotonic(), sizes.seconds[phase]
        print(f"{phase}: begins, {budget:.0f} s", flush=True)
        process = subprocess.Popen(command, start_new_session=True, env=environment(work), pass_fds=(lock,))
        try:
            code = process.wait(timeout=GRACE * budget)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        seconds = time.monotonic() - begin
        status = work.result(phase).get("status", "nothing")
        print(f"{phase}: {status} after {seconds:.0f} s (exit status {code})", flush=True)


def run_phase(work: Work, phase: str, toy: bool) -> None:
    """Run one phase in this process."""
    begin, sizes = time.monotonic(), _sizes(toy)
    importlib.import_module(f"phases.{phase}").run(work, sizes, begin + sizes.seconds[phase])


def _sizes(toy: bool) -> Sizes:
    return TOY if toy else GPU


def watch(work: Work, phases: list[str], toy: bool, seconds: float) -> bool:
    """Start the driver unless it runs, watch it for at most `seconds`, and return whether it has ended."""
    work.root.mkdir(parents=True, exist_ok=True)
    path, end = work.root / "lock", time.monotonic() + seconds
    with path.open("w") as lock, (work.root / "log.txt").open("ab") as log:
        if _free(lock):
            command = [sys.executable, str(HERE / "job.py"), "drive", "--work", str(work.root), *["--toy"] * toy]
            subprocess.Popen(
                [*command, "--phases", ",".join(phases), "--lock", str(lock.fileno())],
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment(work),
                pass_fds=(lock.fileno(),),
            )  # fmt: skip
    while True:
        with path.open("w") as lock:
            if _free(lock):
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.5)


def _free(lock: IO[str]) -> bool:
    """Take the lock if it is free, and return whether it was; the last process that inherits it releases it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def deliver(work: Work, out: Path) -> list[str]:
    """Copy the results to `out`: a JSON file for each phase, the log, and the base model in parts."""
    out.mkdir(parents=True, exist_ok=True)
    files = sorted((work.root / "results").glob("*.json"))
    for path in files:
        shutil.copy(path, out / path.name)
    log = work.root / "log.txt"
    if log.exists():
        (out / "log.txt").write_bytes(log.read_bytes()[-MOST_BYTES:])
    if base := work.newest_base():
        content = base.read_bytes()
        for number, start in enumerate(range(0, len(content), MOST_BYTES)):
            (out / f"{work.base.name}.{number:02}").write_bytes(content[start : start + MOST_BYTES])
    names = sorted(path.name for path in out.iterdir())
    large = [name for name in names if (out / name).stat().st_size > MOST_BYTES + 2**20]
    if len(names) > MOST_FILES or large:
        print(f"more than comes back: {len(names)} files, too large: {', '.join(large) or 'none'}")
    return names


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["take", "run", "drive", "phase"])
    parser.add_argument("what", nargs="*", help="take: parcels; phase: its name")
    parser.add_argument("--work", type=Path, default=Path.home() / "robust-prune-gpu")
    parser.add_argument("--out", type=Path, help="run: where results are copied to")
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--seconds", type=float, default=560.0, help="run: how long to watch")
    parser.add_argument("--toy", action="store_true", help="the rehearsal's sizes, on a CPU")
    parser.add_argument("--lock", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = Work(args.work.absolute())
    if args.verb == "take" and not args.what:
        parser.error("take wants the folders of parcels")
    if args.verb == "phase" and (len(args.what) != 1 or args.what[0] not in PHASES):
        parser.error(f"phase wants one of {', '.join(PHASES)}")
    for folder in filter(None, (args.work, args.out)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"{folder} cannot be made: {error.strerror}")
    phases = args.phases.split(",")
    if unknown := set(phases) - set(PHASES):
        parser.error(f"--phases takes {', '.join(PHASES)}; got {', '.join(sorted(unknown))}")
    if args.verb == "take":
        for folder in args.what:
            take(Path(folder), work)
    elif args.verb == "drive":
        drive(work, phases, args.toy, args.lock)
    elif args.verb == "phase":
        run_phase(work, args.what[0], args.toy)
    else:
        if args.out is None:
            parser.error("run wants --out, the folder that results are copied to")
        ended = watch(work, phases, args.toy, args.seconds)
        names = deliver(work, args.out)
        states = {phase: work.result(phase).get("status", "nothing") for phase in phases}
        print((work.root / "log.txt").read_text(encoding="utf-8", errors="replace")[-3000:])
        print(json.dumps(states), f"in {args.out}: {', '.join(names)}")
        print("The phases have ended." if ended else "Still running: give the same command again.")


if __name__ == "__main__":
    main()
