"""Run a study as a SLURM job array. Only SLURM schedules, requeues and ends the jobs."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from experiments.study.plan import LOGS, PlannedRun, state_of, to_paste
from utils.runs.flags import UsageError, require
from utils.runs.folder import ROOT

LARGEST_ARRAY = 1_000  # SLURM's default MaxArraySize is 1,001
JOBS = "slurm"  # folder in the study's folder, with a list of runs for each submitted array
OF_A_JOB = ("SLURM", "SRUN_", "SBATCH_CPU_BIND", "SBATCH_MEM_BIND", "PMI")  # how variables begin that SLURM sets in a job
OF_A_JOB += ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
NEEDED = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")  # by SLURM's commands, to find their cluster
UNWANTED = ("SQUEUE_", "SBATCH_WAIT")  # they would hide jobs that are in the queue, or wait for the end of all


def environment() -> dict[str, str]:
    """Return the environment of SLURM's commands, which sbatch passes on to the jobs. If this process is itself in a job (of
    `sbatch`, `srun` or `salloc`), that job's resources are left out: new jobs have their own."""
    left_out = UNWANTED + (OF_A_JOB if "SLURM_JOB_ID" in os.environ else ())
    return {name: value for name, value in os.environ.items() if name in NEEDED or not name.startswith(left_out)}


def _ask(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=60)
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
    gone = "builds-v0" in Path(sys.executable).parts
    said = "--slurm: the Python of `uv run --with` disappears before the jobs start; install its packages with uv pip install"
    require(not gone, f"{said}, and start this with python")
    states = {run.name: state_of(logdir, run).kind for run in runs}
    waiting = queued(logdir)
    wanted = [run for run in runs if run.name not in waiting and states[run.name] not in ("finished", "running")]
    (logdir / JOBS).mkdir(exist_ok=True)
    (logdir / LOGS).mkdir(exist_ok=True)
    jobs, began = [], time.strftime("%Y%m%d-%H%M%S")
    for first in range(0, len(wanted), LARGEST_ARRAY):
        part, stamp = wanted[first : first + LARGEST_ARRAY], f"{logdir.name}-{began}-{first}"
        listed = logdir / JOBS / f"{stamp}.txt"
        listed.write_text("".join(f"{run.name}\t{to_paste(run.command)}\n" for run in part))
        words = ["sbatch", "--parsable", f"--job-name={stamp}", f"--array=1-{len(part)}", f"--chdir={ROOT}"]
        words += [f"--output={logdir / LOGS / '%x-%a.slurm'}", str(script), str(listed), str(logdir / LOGS)]
        try:
            jobs.append(_ask(*words).strip().partition(";")[0])
        except UsageError:
            listed.unlink()
            raise
    return jobs, len(wanted), len(waiting)
