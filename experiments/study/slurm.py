"""Run a study as a SLURM job array. Only SLURM schedules, requeues and ends the jobs."""

import shlex
import shutil
import subprocess
import time
from pathlib import Path

from experiments.study.grid import LOGS, PlannedRun, state_of
from utils.runs.flags import UsageError, require
from utils.runs.folder import ROOT

LARGEST_ARRAY = 1_000  # SLURM's default MaxArraySize is 1,001
JOBS = "slurm"  # folder in the study's folder, with a list of runs for each submitted array


def _ask(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{words[0]}: does not respond ({error})") from None
    require(done.returncode == 0, f"{words[0]}: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout


def queued(logdir: Path) -> set[str]:
    """Return the names of the runs that are pending or running in SLURM.

    Raises:
        UsageError: SLURM does not respond.
    """
    lists = {path.stem: path.read_text().splitlines() for path in (logdir / JOBS).glob("*.txt")}
    names = set()
    for line in _ask("squeue", "--me", "--noheader", "--array", "--format=%j %K").splitlines() if lists else []:
        job, _, index = line.strip().rpartition(" ")
        if job in lists and index.isdecimal():
            names.add(lists[job][int(index) - 1].partition("\t")[0])
    return names


def submit(logdir: Path, runs: list[PlannedRun], script: Path) -> tuple[list[str], int, int]:
    """Submit arrays with one job for each run that is not finished, running or in the queue.

    Args:
        logdir: the folder of the study, visible from all nodes.
        runs: all runs of the study.
        script: the batch script; its arguments are the list of runs and the folder for their output.

    Returns:
        The ids of the arrays, their total number of jobs, and the number of runs that were already in the queue.

    Raises:
        UsageError: SLURM is missing or rejects the job.
    """
    require(
        shutil.which("sbatch") is not None, "--slurm: sbatch is missing on this machine; use a login node, or leave out --slurm"
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
