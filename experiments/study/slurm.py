"""Runs of a study as an array of SLURM jobs, which SLURM alone schedules, requeues and ends."""

import shlex
import shutil
import subprocess
import time
from pathlib import Path

from experiments.study.grid import LOGS, PlannedRun, state_of
from utils.runs.flags import UsageError, require
from utils.runs.folder import ROOT

LARGEST_ARRAY = 1_000  # SLURM's MaxArraySize, if nobody has changed it, is 1,001
JOBS = "slurm"  # the folder in a study's that has a list of runs for each array submitted


def _ask(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{words[0]}: does not answer ({error})") from None
    require(done.returncode == 0, f"{words[0]}: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout


def queued(logdir: Path) -> set[str]:
    """The names of the runs that SLURM has not ended: they wait, or a job works at them.

    Raises:
        UsageError: it does not answer.
    """
    lists = {path.stem: path.read_text().splitlines() for path in (logdir / JOBS).glob("*.txt")}
    names = set()
    for line in _ask("squeue", "--me", "--noheader", "--array", "--format=%j %K").splitlines() if lists else []:
        job, _, index = line.strip().rpartition(" ")
        if job in lists and index.isdecimal():
            names.add(lists[job][int(index) - 1].partition("\t")[0])
    return names


def submit(logdir: Path, runs: list[PlannedRun], script: Path) -> tuple[list[str], int, int]:
    """Submits arrays with a job for each run that is neither finished nor in the queue.

    Args:
        logdir: the folder of the study, which all nodes see.
        runs: of the study.
        script: the batch script; it is called with the list of runs, and the folder for what they print.

    Returns:
        The ids of the arrays, how many jobs they have together, and how many runs were in the queue.

    Raises:
        UsageError: there is no SLURM, or it refuses the job.
    """
    require(
        shutil.which("sbatch") is not None, "--slurm: there is no sbatch on this machine; launch it without, or on a login node"
    )
    require(script.is_file(), f"--slurm-script {script}: no such file")
    states = {run.name: state_of(logdir, run).kind for run in runs}
    waiting = queued(logdir)
    wanted = [run for run in runs if run.name not in waiting and states[run.name] not in ("finished", "running")]
    (logdir / JOBS).mkdir(exist_ok=True)
    (logdir / LOGS).mkdir(exist_ok=True)
    jobs, began = [], time.strftime("%Y%m%d-%H%M%S")
    for first in range(0, len(wanted), LARGEST_ARRAY):
        part, stamp = wanted[first : first + LARGEST_ARRAY], f"{logdir.name}-{began}-{first}"
        listed = logdir / JOBS / f"{stamp}.txt"
        listed.write_text("".join(f"{run.name}\t{shlex.join(run.command)}\n" for run in part))
        words = ["sbatch", "--parsable", f"--job-name={stamp}", f"--array=1-{len(part)}", f"--chdir={ROOT}"]
        words += [f"--output={logdir / LOGS / '%x-%a.slurm'}", str(script), str(listed), str(logdir / LOGS)]
        try:
            jobs.append(_ask(*words).strip().partition(";")[0])
        except UsageError:
            listed.unlink()
            raise
    return jobs, len(wanted), len(waiting)
