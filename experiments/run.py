"""Run a study in one command: scripts x environments x seeds, on this machine or as a SLURM job array.

    uv run experiments/run.py --scripts ppo deep_mdp_ppo deep_spi --env-ids Breakout-v5 Pong-v5 --num-seeds 5
    uv run experiments/run.py --scripts ppo "deep_spi --transition-loss-coef 1e-3" --env-ids minatar -- --clip-coef 0.2

Flags after `--` apply to every run. The progress of a study is stored in its run folders. After an interruption, repeat the
command: it resumes interrupted runs, skips finished runs and retries failed runs. The exit code is 0 once all runs are
finished. `--status --logdir ...` prints the progress at any time, from any terminal.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

from dataclasses import dataclass  # noqa: E402

from experiments.study import estimates, local, slurm, status  # noqa: E402
from experiments.study.plan import (  # noqa: E402
    LOGS,
    SEARCH,
    PlannedRun,
    claim,
    count_extended,
    plan,
    read_plan,
    state_of,
    to_paste,
    write_plan,
)
from utils.runs.flags import UsageError, parse_command, require  # noqa: E402
from utils.runs.launch import fail, run_main  # noqa: E402
from utils.runs.outputs import expand  # noqa: E402


@dataclass
class Args:
    """Run a study: scripts x environments x seeds."""

    scripts: tuple[str, ...] = ("ppo", "deep_mdp_ppo", "deep_spi")
    """training scripts: ppo, deep_mdp_ppo, deep_spi, dream_spi, or the path of your own. Quote a script to give it flags,
    "deep_spi --transition-loss-coef 1e-3"; a script may appear several times with different flags"""
    env_ids: tuple[str, ...] = ("Breakout-v5",)
    """environments: ids, or the sets ale57, ale61 (the paper's games), atari5 (a subset), minatar, gridworld"""
    num_seeds: int = 3
    """runs of each script in each environment, one per seed"""
    start_seed: int = 1
    """first seed; the others are consecutive"""
    logdir: Path = Path("runs/study")
    """folder of the study: one subfolder for each run, and logs/ for their output"""
    gpus: tuple[str, ...] | None = None
    """indices or UUIDs of the GPUs to use (default: all visible GPUs and MIG instances; without a value: none)"""
    runs_per_gpu: int = 1
    """number of concurrent runs on each GPU, which share its memory"""
    workers: int | None = None
    """number of concurrent runs if no GPU is used (default: one per core, or fewer under a container's CPU quota);
    the cores are divided among them"""
    dry_run: bool = False
    """print the commands and estimates of their time and disk space, and start nothing"""
    status: bool = False
    """print the progress of the study in --logdir, and start nothing"""
    slurm: bool = False
    """submit the runs as a SLURM job array instead of running them here"""
    slurm_script: Path = Path(__file__).parent / "slurm.sh"
    """batch script of each SLURM job"""


def show_status(logdir: Path) -> None:
    """Print the progress of all runs in the folder."""
    runs = read_plan(logdir)
    states = status.Progresses(logdir, runs).states
    print("\n".join([*status.table(runs, states), "", status.summary(runs, states)]))
    for line in (*status.running(runs, states), *status.failures(runs, states)):
        print(line)
    try:
        waiting = slurm.queued(logdir)
        print(f"pending or running in SLURM: {len(waiting)}" if waiting else "", end="")
    except UsageError as error:
        print(f"*** cannot read SLURM's queue: {error} ***", end="")
    print()


def show_plan(logdir: Path, runs: list[PlannedRun], together: int) -> None:
    """Print the commands of the runs, and estimates of their time and disk space."""
    for run in runs:
        print(to_paste(run.command))
    print("\n".join(estimates.describe(logdir, runs, together)))


def main(args: Args, flags: list[str]) -> None:
    """Launch the runs, or print their progress or plan."""
    logdir = expand(args.logdir, "--logdir").absolute()
    if args.status:
        return show_status(logdir)
    require(args.num_seeds >= 1, f"--num-seeds {args.num_seeds}: must be at least 1")
    seeds = list(range(args.start_seed, args.start_seed + args.num_seeds))
    runs = plan(args.scripts, args.env_ids, seeds, flags, logdir)
    if args.slurm:
        local.refuse_resources(args.gpus, args.runs_per_gpu, args.workers)
    require(not (logdir / SEARCH).exists(), f"--logdir {logdir}: contains a search of tune.py; choose another folder")
    slots = [] if args.slurm else local.make_slots(args.gpus, args.runs_per_gpu, args.workers)
    if extended := count_extended(logdir, runs):
        said = "their schedules are stretched, so they differ from new runs of this length (docs/runs.md)"
        print(f"*** finished runs that get more steps: {extended}; {said} ***")
    if args.dry_run:
        return show_plan(logdir, runs, max(1, len(slots)))
    lock = claim(logdir)
    write_plan(logdir, runs)
    if args.slurm:
        jobs, submitted, waiting = slurm.submit(logdir, runs, expand(args.slurm_script, "--slurm-script").absolute())
        finished = sum(state_of(logdir, run).kind == "finished" for run in runs)
        print(f"{finished} of {len(runs)} runs finished, {waiting} already in SLURM's queue, {submitted} submitted", end="")
        print(f" (job {', '.join(jobs)})" if jobs else "")
    else:
        left = local.launch(logdir, local.Source(runs), slots)
        states = {run.name: state_of(logdir, run) for run in runs}
        print("\n".join([*status.table(runs, states), "", status.summary(runs, states), *status.failures(runs, states)]))
        if left:
            diverged = sum("not finite" in states[run.name].error for run in left)
            said = f"see their output in {logdir / LOGS}"
            said += f"; {diverged} diverged, and usually diverge again" if diverged else ""
            said += "; repeat the command to resume the others" if diverged < len(left) else ""
            fail(f"{len(left)} of {len(runs)} runs are not finished; {said}", 1)
    lock.release()


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    run_main(lambda: main(parse_command(Args, sys.argv[1:split]), sys.argv[split + 1 :]))
