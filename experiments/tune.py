"""Search for good settings of a script with Optuna, on several environments at once.

    uv run --extra tune --extra minatar experiments/tune.py --script deep_spi --logdir runs/tune --seeds 901 --trials 40 \\
        --env-ids Asterix-MinAtar Breakout-MinAtar SpaceInvaders-MinAtar --search learning-rate=log:2e-4:8e-3 \\
        --search num-minibatches=4,8,16,32 -- --total-timesteps 500000

A trial trains the script in each environment with each seed, and all its runs have the same flags. Its value is the mean over
environments of the scaled return: the mean return of the last tenth of the steps, where 0 is random play and 1 a reference.
Flags after `--` apply to every run. After an interruption, repeat the command: finished runs are kept, interrupted ones are
resumed, and the search continues as if it had never stopped. Choose seeds that no reported result uses.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

import shlex  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402
from typing import Annotated, Any, Literal, NamedTuple  # noqa: E402

import tyro  # noqa: E402

from envs.own import absolute  # noqa: E402
from experiments.run import show_plan  # noqa: E402
from experiments.study import local, slurm  # noqa: E402
from experiments.study.plan import LOGS, PlannedRun, args_of, claim, plan, planned_in, script_path, without_sets  # noqa: E402
from experiments.study.status import Live  # noqa: E402
from utils.runs.flag_types import as_typed  # noqa: E402
from utils.runs.flags import parse_command, require  # noqa: E402
from utils.runs.launch import fail, run_main  # noqa: E402
from utils.runs.outputs import expand  # noqa: E402


@dataclass
class Args:
    """Search for good settings of a script."""

    search: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """a flag to vary, and its values: learning-rate=log:2e-4:8e-3 (interval, uniform in the logarithm), ent-coef=0:0.05
    (interval, uniform), num-minibatches=4,8,16 (choices), transition-layers=128,"512 512", (choices; the last one is empty).
    Repeat it for each flag"""
    script: str = "deep_spi"
    """training script: ppo, deep_mdp_ppo, deep_spi, dream_spi, or the path of your own"""
    env_ids: tuple[str, ...] = ("Asterix-MinAtar", "Breakout-MinAtar", "SpaceInvaders-MinAtar")
    """environments of each trial: ids, or sets as in experiments/run.py"""
    seeds: tuple[int, ...] = (901,)
    """seeds of each trial's runs in each environment"""
    trials: int = 40
    """number of trials of the whole search; a continued search may have more"""
    logdir: Path = Path("runs/tune")
    """folder of the search: its runs, Optuna's storage, the table of trials, and logs/"""
    scale: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """mean returns that are scaled to 0 and 1, ENV-ID=LOW:HIGH (default: random play and a reference for MinAtar, random play
    and a human for Atari). Repeat it for each environment"""
    concurrent_trials: int = 2
    """number of trials in progress at a time; with --slurm, number of jobs. The values of trial n depend on trials 0 to n minus
    this number"""
    sampler_seed: int = 1
    """seed of Optuna's sampler (TPE); the first trial has the script's defaults if they lie in the search space"""
    pruner: Literal["none", "median", "halving"] = "none"
    """end bad trials early: by the median of earlier trials, or by successive halving"""
    prune_on: Literal["games", "steps"] = "games"
    """when --pruner looks at a trial: after each environment, in the order of --env-ids, or after each quarter of the steps"""
    replace_failed: bool = False
    """propose new trials in place of those that failed so far for another reason than divergence, such as a full disk"""
    gpus: tuple[str, ...] | None = None
    """indices or UUIDs of the GPUs to use (default: all visible GPUs and MIG instances; without a value: none)"""
    runs_per_gpu: int = 1
    """number of concurrent runs on each GPU, which share its memory"""
    workers: int | None = None
    """number of concurrent runs if no GPU is used (default: one per core, or fewer under a container's CPU quota)"""
    dry_run: bool = False
    """print the commands of the first trial and estimates of its time and disk space, and start nothing"""
    status: bool = False
    """print what the search has found so far, and start nothing"""
    slurm: bool = False
    """submit --concurrent-trials SLURM jobs that work on the search together, instead of running it here"""
    slurm_script: Path = Path(__file__).parent / "slurm.sh"
    """batch script of each SLURM job"""
    worker: int = 0
    """number of the SLURM job that this process is; set by --slurm"""


class Asked(NamedTuple):
    """A search as the command line describes it."""

    settings: Any  # experiments.study.search.Settings
    args_type: type  # declares the script's flags
    space: dict[str, Any]  # distribution of each searched flag
    first: dict[str, Any] | None  # values of the first trial, if they are the defaults


def read_command(args: Args, flags: list[str]) -> Asked:
    """Check the command line before anything starts.

    Raises:
        UsageError: a flag is wrong.
    """
    from experiments.study.search import Settings, make_scale
    from experiments.study.space import as_words, check_space, default_params, ends, parse_space, size
    from experiments.study.trials import is_of_trial

    for flag in ("trials", "concurrent_trials"):
        require(getattr(args, flag) >= 1, f"{as_typed(flag, getattr(args, flag))}: must be at least 1")
    require(args.sampler_seed >= 0, f"--sampler-seed {args.sampler_seed}: must be 0 or more")
    require(len(args.seeds) > 0, "--seeds: name at least one")
    require(len(set(args.seeds)) == len(args.seeds), f"{as_typed('seeds', args.seeds)}: has duplicates; remove them")
    require(args.pruner != "none" or args.prune_on == "games", "--prune-on: is used only with --pruner; leave it out")
    if args.slurm:
        local.refuse_resources(args.gpus, args.runs_per_gpu, args.workers)
    env_ids = tuple(map(absolute, without_sets(args.env_ids)))
    path = script_path(args.script)
    args_type, script = args_of(path), str(path) if path.parent != ROOT else args.script
    space, scale = parse_space(args.search, args_type), make_scale(env_ids, args.scale)
    check_space(space, args_type, env_ids, flags)
    require(
        args.trials <= size(space), f"--trials {args.trials}: the search space has only {size(space):.0f} settings; use fewer"
    )
    require(
        args.pruner == "none" or args.prune_on == "steps" or len(env_ids) > 1, "--prune-on games: needs several environments"
    )
    first = default_params(space, args_type, env_ids, flags)
    sample = first or {name: ends(of)[0] for name, of in space.items()}
    logdir = expand(args.logdir, "--logdir").absolute()
    require(all(map(is_of_trial, planned_in(logdir))), f"--logdir {logdir}: contains a study of run.py; choose another folder")
    plan((shlex.quote(script),), env_ids, list(args.seeds), [*flags, *as_words(sample, args_type)], logdir, prefix="any__")
    asked = [script, list(env_ids), list(args.seeds), list(args.search), flags, scale]
    settings = Settings(*asked, args.sampler_seed, args.concurrent_trials, args.pruner, args.prune_on)
    return Asked(settings, args_type, space, first)


def submit(args: Args, search: Any) -> None:
    """Submit the jobs that are neither running nor in the queue."""
    asked = search.settings
    typed = [f"--script={asked.script}", "--env-ids", *asked.env_ids, "--seeds", *map(str, asked.seeds)]
    for flag in ("trials", "concurrent_trials", "sampler_seed", "pruner", "prune_on"):
        typed.append(f"--{flag.replace('_', '-')}={getattr(args, flag)}")
    typed += [*(f"--search={text}" for text in asked.search), *(f"--scale={text}" for text in args.scale), "--", *asked.flags]
    jobs = []
    for number in range(1, args.concurrent_trials + 1):
        command = [sys.executable, str(Path(__file__).absolute()), f"--worker={number}", f"--logdir={search.logdir}", *typed]
        jobs.append(PlannedRun(f"worker-{number}", args.script, "", 0, sys.maxsize, command))
    ids, submitted, waiting = slurm.submit(search.logdir, jobs, expand(args.slurm_script, "--slurm-script").absolute())
    print(f"{waiting} jobs already in SLURM's queue, {submitted} submitted" + (f" (job {', '.join(ids)})" if ids else ""))


def main(args: Args, flags: list[str]) -> None:
    """Work on the search, or print its plan or what it has found."""
    require(find_spec("optuna") is not None, "needs Optuna: use uv run --extra tune ..., or pip install optuna")
    from experiments.study import search_report, trials
    from experiments.study.search import Search, read_settings
    from experiments.study.space import parse_space

    logdir = expand(args.logdir, "--logdir").absolute()
    if args.status:
        settings = read_settings(logdir)
        args_type = args_of(script_path(settings.script))
        search = Search(logdir, settings, parse_space(tuple(settings.search), args_type), None, storage="memory")
        return print("\n".join(search_report.write_report(search, args_type)))
    settings, args_type, space, first = read_command(args, flags)
    slots = [] if args.slurm else local.make_slots(args.gpus, args.runs_per_gpu, args.workers)
    if args.dry_run:
        with TemporaryDirectory() as temporary:
            search = Search(Path(temporary), settings, space, first)
            params, search.logdir = search.params(0), logdir
            runs = trials.runs_of(search, args_type, 0, params)
        print(f"the first of {args.trials} trials:")
        return show_plan(logdir, [run for of in runs.values() for run in of], max(1, len(slots)))
    lock = claim(logdir / f"worker-{args.worker}" if args.worker else logdir)
    search = Search(logdir, settings, space, first, storage="journal" if args.slurm or args.worker else "sqlite")
    if args.replace_failed:
        search.replace_failed()
    live = Live()
    source = trials.Trials(search, args_type, args.trials, 1 if args.worker else args.concurrent_trials, live)
    if args.slurm and not source.is_over():
        return submit(args, search)
    over = len(search.trials())
    print(f"{over} of {source.total} trials are over; up to {len(slots)} runs at a time, in {logdir}", flush=True)
    local.launch(logdir, source, slots, live)
    if not source.is_over():
        return print("the other jobs finish the last trials")
    print("\n".join(search_report.write_report(search, args_type)))
    if search_report.best_trial(search.trials()) is None:
        fail(f"no trial is complete; see the reasons in {logdir / search_report.TABLE}, and the logs in {logdir / LOGS}", 1)
    lock.release()


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    run_main(lambda: main(parse_command(Args, sys.argv[1:split]), sys.argv[split + 1 :]))
