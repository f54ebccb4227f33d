"""A study in one command: scripts x environments x seeds, on this machine or as an array of SLURM jobs.

    uv run experiments/run.py --scripts ppo deep_mdp_ppo deep_spi --env-ids Breakout-v5 Pong-v5 --num-seeds 5
    uv run experiments/run.py --scripts ppo "deep_spi --transition-loss-coef 1e-3" --env-ids minatar -- --clip-coef 0.2

What follows `--` are flags of every run. The folders of the runs say how far the study is: whatever stopped it, the same
command goes on with what was interrupted, leaves out what is finished, and tries again what has failed. It ends with 0 when all
runs are finished; `--status --logdir ...` shows at any time and from anywhere how far they are.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

import shlex  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import tyro  # noqa: E402

from experiments.study import estimates, local, slurm, status  # noqa: E402
from experiments.study.grid import LOGS, PlannedRun, claim, plan, read_plan, state_of, write_plan  # noqa: E402
from utils.runs.flags import UsageError, require  # noqa: E402
from utils.runs.launch import fail, run_main  # noqa: E402


@dataclass
class Args:
    """Flags of the study."""

    scripts: tuple[str, ...] = ("ppo", "deep_mdp_ppo", "deep_spi")
    """what trains: ppo, deep_mdp_ppo, deep_spi, dream_spi, or a script of your own; with flags of its own in quotes,
    "deep_spi --transition-loss-coef 1e-3"; the same script may be there several times with others"""
    env_ids: tuple[str, ...] = ("Breakout-v5",)
    """environments: ids, or ale57, ale61 (the paper's games), atari5 (a subset), minatar, gridworld"""
    num_seeds: int = 3
    """runs of each script in each environment"""
    start_seed: int = 1
    """the first seed; the others follow it"""
    logdir: Path = Path("runs/study")
    """the folder of the study, with those of its runs; what they print is in its logs/"""
    gpus: tuple[str, ...] | None = None
    """numbers of the GPUs to use; if not given all that are visible, if empty none"""
    runs_per_gpu: int = 1
    """runs that share a GPU and its memory"""
    workers: int | None = None
    """runs at a time, where there is no GPU; if not given one for each core. The cores are divided among the runs"""
    dry_run: bool = False
    """show the commands, about how long they take and how much disk, and start nothing"""
    status: bool = False
    """show how far the study in --logdir is"""
    slurm: bool = False
    """submit the runs as an array of SLURM jobs instead of running them here"""
    slurm_script: Path = Path(__file__).parent / "slurm.sh"
    """the batch script of each such job"""


def show_status(logdir: Path) -> None:
    """Prints how far all runs in the folder are."""
    runs = read_plan(logdir)
    states = status.Progresses(logdir, runs).states
    print("\n".join([*status.table(runs, states), "", status.summary(runs, states)]))
    for line in (*status.running(runs, states), *status.failures(runs, states)):
        print(line)
    try:
        waiting = slurm.queued(logdir)
        print(f"in SLURM's queue: {len(waiting)}" if waiting else "", end="")
    except UsageError as error:
        print(f"*** what is in SLURM's queue is not known: {error} ***", end="")
    print()


def show_plan(logdir: Path, runs: list[PlannedRun], together: int) -> None:
    """Prints what would be run, and what that takes."""
    for run in runs:
        print(shlex.join(run.command))
    print("\n".join(estimates.describe(logdir, runs, together)))


def main(args: Args, flags: list[str]) -> None:
    """Launches the runs, or shows what there is of them."""
    logdir = args.logdir.expanduser().absolute()
    if args.status:
        return show_status(logdir)
    require(args.num_seeds >= 1, f"--num-seeds {args.num_seeds}: must be at least 1")
    seeds = list(range(args.start_seed, args.start_seed + args.num_seeds))
    runs = plan(args.scripts, args.env_ids, seeds, flags, logdir)
    slots = local.make_slots(args.gpus, args.runs_per_gpu, args.workers)
    if args.dry_run:
        return show_plan(logdir, runs, len(slots))
    lock = claim(logdir)
    write_plan(logdir, runs)
    if args.slurm:
        ours = args.gpus is None and args.workers is None and args.runs_per_gpu == 1
        require(ours, "--slurm: gives each run what the batch script asks for; leave out --gpus, --runs-per-gpu and --workers")
        jobs, submitted, waiting = slurm.submit(logdir, runs, args.slurm_script.absolute())
        finished = sum(state_of(logdir, run).kind == "finished" for run in runs)
        print(f"{finished} of {len(runs)} runs finished, {waiting} in SLURM's queue before, {submitted} submitted now", end="")
        print(f" (job {', '.join(jobs)})" if jobs else "")
    else:
        left = local.launch(logdir, runs, slots)
        states = {run.name: state_of(logdir, run) for run in runs}
        print("\n".join([*status.table(runs, states), "", status.summary(runs, states), *status.failures(runs, states)]))
        if left:
            said = f"what they said is in {logdir / LOGS}; the same command goes on with them"
            fail(f"{len(left)} of {len(runs)} runs are not finished; {said}", 1)
    lock.release()


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    run_main(lambda: main(tyro.cli(Args, args=sys.argv[1:split]), sys.argv[split + 1 :]))
