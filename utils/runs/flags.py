"""Flags: those that every run has, and the pass that checks all of them.

A flag's annotations (`utils.runs.flag_types`) declare its valid range and the flags it depends on. Constraints between several
flags are checked by the `check` method of the class that declares them.
"""

import dataclasses
import functools
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from envs import minatar
from envs.options import WORDS
from envs.registry import GRIDWORLD, can_render, check_gridworld, family, ids_like, is_pooled, refusal
from utils.runs.family_defaults import FAMILY_DEFAULTS
from utils.runs.flag_types import (
    ANY,
    BY_FAMILY,
    LARGEST,
    MAY_CHANGE,
    Count,
    Default,
    Needs,
    NotNegative,
    Range,
    Seed,
    Share,
    Steps,
    Switch,
    as_typed,
    at_least,
)


class UsageError(Exception):
    """A mistake of the user. The message is one line that names the flag and the remedy."""


ATARI = Needs("an Atari game", lambda args: family(args.env_id) == "atari")
POOL = Needs("an envpool environment", lambda args: is_pooled(args.env_id))
DRAWN = Needs(
    "an environment that can be rendered", lambda args: not args.capture_video or can_render(args.env_id, args.env_option)
)
ON_GRIDWORLD = Needs(env_id=GRIDWORLD)
TRACKED = Needs(track=True)
CHECKPOINTED = Needs("checkpoints (--keep-checkpoints above 0)", lambda args: args.keep_checkpoints > 0)
LAYERS = Needs("dense layers (--fc-layers)", lambda args: len(args.fc_layers) > 0)
WATCHED = Needs("--track-params or --track-grads", lambda args: args.track_params or args.track_grads)


@dataclass
class RunArgs:
    """Flags of every run, independent of the algorithm."""

    env_id: str = "Breakout-v5"
    """environment id: any environment of envpool with one discrete action (Atari, Procgen, MiniGrid, Craftax, and others); a
    MinAtar game; ConfoundingGridworld-v0; or your own, my_envs.py:Corridor or my_package.envs:Corridor. Each family has its own
    defaults (--help --env-id=Breakout-MinAtar shows them)"""
    env_option: tuple[str, ...] = ()
    """options of the environment, such as num_levels=200 start_level=0 on Procgen: those of envpool, or your own environment's
    parameters"""
    reward_clip: Annotated[bool, ATARI] = True
    """Atari: train on the sign of each reward (logged returns are never clipped)"""
    stochastic_env: Annotated[bool, ATARI] = False
    """Atari: use the paper's stochastic protocol, --repeat-action-probability 0.3 --noop-max 60"""
    repeat_action_probability: Annotated[Share | None, ATARI] = None
    """Atari: probability that a frame repeats the previous frame's action (sticky actions); default 0, or 0.3 with
    --stochastic-env"""
    noop_max: Annotated[int | None, Range(lambda x: 1 <= x <= 1000, "must be 1 to 1000"), ATARI] = None
    """Atari: maximum number of no-ops before a game and after each lost life (uniform from 1); default 30, or 60 with
    --stochastic-env"""
    full_action_space: Annotated[bool, ATARI] = False
    """Atari: use all 18 actions, not only those that have an effect in the game"""
    env_step: Annotated[Literal["auto", "xla", "callback"], POOL, MAY_CHANGE] = "auto"
    """how the compiled program steps envpool: xla, inside the program; callback, through Python (same transitions, slightly
    slower); auto, xla where envpool supports it (Linux)"""
    overlap_rollout: Annotated[bool, POOL] = False
    """envpool: split the environments into two halves; the policy acts in one half while the emulators step the other"""
    num_devices: Annotated[Count, MAY_CHANGE] = 1
    """number of devices on this machine that share the environments and each minibatch"""
    gridworld_n_path: Annotated[int, ON_GRIDWORLD] = 5
    """ConfoundingGridworld-v0: column of the two choice cells"""
    gridworld_epsilon: Annotated[float, ON_GRIDWORLD] = 0.2
    """ConfoundingGridworld-v0: probability of entering the lower path"""
    seed: Seed = 1
    """random seed of parameters, environments, actions and minibatches"""
    total_timesteps: Annotated[Steps, BY_FAMILY] = 10_000_000
    """total environment steps of the run (agent steps; an Atari step is 4 frames)"""
    logdir: Annotated[str, MAY_CHANGE] = "runs"
    """parent of the run folders, which contain logs, checkpoints, the model, and run.json (flags, versions, commands)"""
    run_name: Annotated[str | None, MAY_CHANGE] = None
    """name of the run and of its folder; default: environment, algorithm, seed and time"""
    resume: Annotated[str, MAY_CHANGE] = "never"
    """never: start a new run; auto: resume the run named --run-name from its last checkpoint, or start it if it does not
    exist; a path: resume from that run folder or checkpoint"""
    save_every: Annotated[NotNegative, MAY_CHANGE, CHECKPOINTED] = 900.0
    """seconds between checkpoints (0: after every update); the end and a signal also write one, if there is anything to save"""
    keep_checkpoints: Annotated[int, at_least(0), MAY_CHANGE] = 2
    """number of most recent checkpoints to keep; 0 writes none"""
    save_model: Switch = True
    """save the final parameters in the run's folder, for `load_run` (utils/runs/load_run.py)"""
    stop_if_not_finite: Switch = True
    """stop when a loss or a parameter is NaN or infinite; such an update is never saved, whether or not the run stops"""
    debug_nans: Switch = False
    """let JAX check for NaNs after every update; with JAX_DISABLE_JIT=1, the traceback shows the operation (very slow)"""
    track_params: Switch = False
    """log the norm and a histogram of each parameter array"""
    track_grads: Switch = False
    """log the norm and a histogram of each parameter array's gradient: mean over an update's minibatches, before clipping"""
    track_every: Annotated[Count, MAY_CHANGE, WATCHED] = 100
    """updates between measurements of --track-params and --track-grads"""
    capture_video: Annotated[bool, MAY_CHANGE, DRAWN] = False
    """record videos in the run folder's videos/, and with --track in W&B: MP4 with uv run --extra video ..., else GIF"""
    video_every: Annotated[Steps, MAY_CHANGE, Needs(capture_video=True)] = 1_000_000
    """environment steps between videos; one is always recorded at the end"""
    track: Switch = False
    """also log to Weights & Biases (WANDB_MODE=offline keeps the data on this machine)"""
    wandb_project_name: Annotated[str | None, TRACKED] = None
    """W&B project; default: WANDB_PROJECT, or deep-spi"""
    wandb_entity: Annotated[str | None, TRACKED] = None
    """W&B team; default: WANDB_ENTITY, or your own account"""
    wandb_group: Annotated[str | None, TRACKED] = None
    """W&B group of runs to average; default: WANDB_RUN_GROUP, or environment, algorithm and changed flags"""
    wandb_tags: Annotated[tuple[str, ...], TRACKED] = ()
    """W&B tags; default: WANDB_TAGS"""
    upload_model: Annotated[bool, MAY_CHANGE, Needs(track=True, save_model=True)] = False
    """also save the final model in W&B, as an artifact"""

    def check(self) -> None:
        """Raise UsageError if the environment does not exist, or flags of this class contradict each other. The check of the
        gridworld reads `gamma`, which the script declares."""
        if family(self.env_id) is None:
            close = ids_like(self.env_id)
            hint = f"did you mean {' or '.join(close)}?" if close else "see docs/environments.md for the valid ids"
            raise UsageError(f"--env-id {self.env_id}: no such environment; {hint}")
        require(
            self.env_id not in minatar.GAMES or minatar.is_installed(),
            f"--env-id {self.env_id}: {minatar.NEEDED}",
        )
        said = refusal(self.env_id, self.env_option)
        require(said is None, said or "")
        for flag, path in (("logdir", self.logdir), ("resume", self.resume)):
            try:
                Path(path).expanduser()
            except RuntimeError:
                raise UsageError(f"--{flag} {path}: no such user, so no home folder; choose another folder") from None
        name = self.run_name
        require(
            name is None or (name not in ("", "..") and Path(name).name == name and "\0" not in name),
            f"--run-name {name!r}: must be a name, not a path; set the parent folder with --logdir",
        )
        require(
            self.resume != "auto" or name is not None,
            "--resume auto: needs --run-name; add it, or give --resume the path of the run folder",
        )
        require(
            name is None or self.resume in ("never", "auto"),
            f"--resume {self.resume}: already names the run folder; leave out --run-name, or use --resume auto",
        )
        require(
            self.resume == "never" or self.keep_checkpoints > 0,
            f"--resume {self.resume}: needs checkpoints, but --keep-checkpoints 0 writes none; drop one of the two",
        )
        require(
            self.env_step != "xla" or sys.platform.startswith("linux"),
            f"--env-step xla: envpool does not support it on {sys.platform}; leave it out",
        )
        emulated, linux = is_pooled(self.env_id), sys.platform.startswith("linux")
        require(
            self.num_devices == 1 or not emulated or (linux and self.env_step != "callback"),
            f"--num-devices {self.num_devices}: on several devices envpool needs --env-step xla, which works only on Linux; "
            + ("leave out --env-step callback" if linux else "use one"),
        )
        if self.env_id == GRIDWORLD:
            try:
                check_gridworld(self)
            except ValueError as error:
                flag = str(error).replace("_", "-")
                raise UsageError(f"--{'' if flag.startswith('gamma') else 'gridworld-'}{flag}") from None


def check_minibatches(args: Any) -> None:
    """Check that a rollout fits into the run and divides into minibatches.

    Raises:
        UsageError: it does not; the message names the flags to change.
    """
    steps, by_env = args.num_envs * args.num_steps, args.minibatch_by == "env"
    shares = args.num_devices * (1 + args.overlap_rollout)
    rows, what = (args.num_envs, "environments") if by_env else (steps, "transitions")
    replayed = getattr(args, "use_replay_buffer", False)  # its minibatches are not parts of a rollout
    sizes = f"--num-envs {args.num_envs}" + ("" if by_env else f" x --num-steps {args.num_steps} = {steps} transitions")
    require(
        replayed or rows % args.num_minibatches == 0,
        f"{sizes}: not divisible by --num-minibatches {args.num_minibatches}; change one of them",
    )
    require(
        args.num_envs % shares == 0,
        f"--num-envs {args.num_envs}: not divisible into {shares} equal parts (--num-devices {args.num_devices}"
        f"{', two halves each' if args.overlap_rollout else ''}); change one of them",
    )
    rows //= args.num_minibatches
    transitions = rows * args.num_steps if by_env else rows
    require(
        replayed or transitions > 1 or not args.norm_adv,
        "--norm-adv: a minibatch of one transition normalizes its advantage to 0, so nothing is learned; use --no-norm-adv, or "
        f"fewer --num-minibatches than {args.num_minibatches}",
    )
    require(
        replayed or rows % args.num_devices == 0,
        f"--num-devices {args.num_devices}: does not divide a minibatch of {rows} {what}; use fewer "
        "--num-minibatches or more --num-envs",
    )
    require(
        args.total_timesteps >= steps,
        f"--total-timesteps {args.total_timesteps}: less than one rollout of --num-envs {args.num_envs} x --num-steps "
        f"{args.num_steps}; use at least {steps}",
    )
    require(
        args.total_timesteps // steps <= LARGEST,
        f"--total-timesteps {args.total_timesteps}: more than {LARGEST} updates; use fewer steps or larger rollouts",
    )


def require(condition: bool, message: str) -> None:
    """Raise UsageError with the message unless the condition holds."""
    if not condition:
        raise UsageError(message)


def refuse_unread(args: Any, flags: tuple[str, ...], needed: str) -> None:
    """Refuse flags that have no effect. Raise UsageError for the first one that differs from its default.

    `needed` names the condition under which they have an effect.
    """
    default = defaults(type(args), getattr(args, "env_id", ""))
    for flag in flags:
        value = getattr(args, flag)
        require(value == default[flag], f"{as_typed(flag, value)}: is used only with {needed}; leave it out")


@functools.cache
def defaults(args_type: type, env_id: str) -> Mapping[str, Any]:
    """Return the default of each flag in that environment."""
    values = {field.name: field.default for field in dataclasses.fields(args_type)} | {"env_id": env_id}
    kind = family(env_id)
    for name, hint in get_type_hints(args_type, include_extras=True).items():
        for said in annotations_of(hint):
            if said is BY_FAMILY:
                values[name] = FAMILY_DEFAULTS.get(kind, {}).get(name, values[name])
            if isinstance(said, Default):
                values[name] = said.families.get(kind, values[name])
    return MappingProxyType(values)


def make_args(args_type: type, **flags: Any) -> Any:
    """Create flags as the command line does: those that are not given have the environment's defaults."""
    return args_type(**defaults(args_type, flags.get("env_id", args_type.env_id)) | flags)


def own_defaults(args: Any) -> list[str]:
    """Return the flags, as on the command line, whose value is a default specific to the environment's family."""
    usual, own = defaults(type(args), ""), defaults(type(args), args.env_id)
    names = [name for name in own if name != "env_id" and usual[name] != own[name] == getattr(args, name)]
    return [as_typed(name, getattr(args, name)) for name in names]


def check_flags(args: Any) -> None:
    """Check each flag against its annotations, then call the `check` method of each class of flags, base classes before the
    script's own.

    Raises:
        UsageError: the first mistake found.
    """
    classes = [cls for cls in reversed(type(args).__mro__) if "check" in vars(cls)]
    if RunArgs in classes:  # the needs of flags depend on a valid environment id
        classes.remove(RunArgs)
        RunArgs.check(args)
    hints = get_type_hints(type(args), include_extras=True)
    for field in dataclasses.fields(args):
        value, said = getattr(args, field.name), list(annotations_of(hints[field.name]))
        for need in (x for x in said if isinstance(x, Needs)):
            if not need.when(args):
                refuse_unread(args, (field.name,), need.text)
        for one in value if isinstance(value, tuple) else (value,):
            if one is None or isinstance(one, (str, bool)):
                continue
            typed = as_typed(field.name, value)
            for allowed in [x for x in said if isinstance(x, Range)] or [ANY]:
                require(allowed.holds(one), f"{typed}: {allowed.remedy}")
                require(isinstance(one, float) or one <= allowed.limit, f"{typed}: must be at most {allowed.limit}")
            require(math.isfinite(one), f"{typed}: must be a finite number")
    for cls in classes:
        vars(cls)["check"](args)


def annotations_of(hint: Any) -> Iterator[Any]:
    """Yield the annotations of a type and of the types nested in it."""
    if get_origin(hint) is Annotated:
        yield from hint.__metadata__
    if get_origin(hint) is not Literal:
        for inner in get_args(hint):
            yield from annotations_of(inner)


def _takes_list(hint: Any) -> bool:
    """Return True if the type of a flag is a tuple, possibly annotated or optional."""
    return get_origin(hint) is tuple or any(map(_takes_list, get_args(hint)))


def refuse_repeated(args_type: type, tokens: list[str]) -> None:
    """Refuse a flag for a list that is given twice: the second would silently replace the first.

    Raises:
        UsageError: there is one.
    """
    hints = get_type_hints(args_type, include_extras=True)
    appends = {name for name, hint in hints.items() if tyro.conf.UseAppendAction in annotations_of(hint)}
    lists = {name for name, hint in hints.items() if _takes_list(hint)} - appends
    given = Counter(token.partition("=")[0].removeprefix("--").replace("-", "_") for token in tokens if token.startswith("--"))
    for name in lists:
        flag = f"--{name.replace('_', '-')}"
        require(given[name] < 2, f"{flag}: is given {given[name]} times; write all its values after one {flag}")


def parse_command(args_type: type, argv: list[str] | None = None) -> Any:
    """Parse the command line of a program that is not a training script (`parse_flags`).

    Raises:
        UsageError: a flag for a list is given twice.
    """
    tokens = sys.argv[1:] if argv is None else argv
    refuse_repeated(args_type, tokens)
    return tyro.cli(args_type, args=tokens)


def parse_flags(args_type: type, argv: list[str] | None = None) -> Any:
    """Parse the command line of a training script. Switches are `--track` and `--no-anneal-lr`, or `--track=True` and
    `--anneal_lr False`, as sweeps pass them. Flags that are not given have the environment's defaults.

    Raises:
        UsageError: a switch has another value than True or False, or a flag for a list is given twice.
    """
    env_id = args_type.env_id
    switches = {field.name for field in dataclasses.fields(args_type) if isinstance(field.default, bool)}
    typed, tokens = [], list(sys.argv[1:] if argv is None else argv)
    refuse_repeated(args_type, tokens)
    while tokens:
        token = tokens.pop(0)
        name, equals, value = token.partition("=")
        flag = name.removeprefix("--").replace("-", "_") if name.startswith("--") else ""
        if flag == "env_id":
            env_id = value if equals else next(iter(tokens), "")
        on = flag in switches
        if not on and flag.removeprefix("no_") not in switches:
            typed.append(token)
            continue
        if not equals and tokens and not tokens[0].startswith("-"):
            value, equals = tokens.pop(0), "="
        if equals:
            require(value.lower() in WORDS, f"{name} {value}: must be True or False")
            on = on == WORDS[value.lower()]
        typed.append(f"--{'' if on else 'no-'}{flag if flag in switches else flag.removeprefix('no_')}".replace("_", "-"))
    return tyro.cli(args_type, args=typed, default=make_args(args_type, env_id=env_id))
