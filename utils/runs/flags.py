"""Flags: those that every run has, how a flag says what it takes, and the one pass that checks all of them.

A flag's range, what it needs, and whether a continued run may change it stand at the flag:

    gae_lambda: Share = 0.95
    num_classes: Annotated[int, at_least(2), Needs(latent="categorical")] = 32
    save_every: Annotated[NotNegative, MAY_CHANGE] = 900.0

`check_flags` reads them there, and `defaults` a default that an environment's family has of its own:

    num_envs: Annotated[Count, Default(minatar=64)] = 128

What concerns several flags stands in a method `check` of the class that declares them.
"""

import dataclasses
import difflib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import tyro

from envs import minatar
from envs.registry import GRIDWORLD, check_gridworld, env_ids, family

LARGEST = 2**31 - 1  # JAX counts in 32 bits


class UsageError(Exception):
    """A mistake of whoever started the run. Its text is one line that names the flag and the remedy."""


class Range(NamedTuple):
    """What values a flag takes (each value, where it takes several)."""

    holds: Callable[[Any], bool]
    remedy: str
    limit: int = LARGEST  # of whole numbers


class Needs:
    """Without what a flag is not read, so that a value of its own is refused: other flags of the given values.

    Args:
        text: names the need; made from the flags if not given.
        when: says of all flags whether the need is met, where values of flags cannot say it.
        flags: the values, or tuples of them.
    """

    def __init__(self, text: str | None = None, when: Callable[[Any], bool] | None = None, **flags: Any):
        self.flags = {name: value if isinstance(value, tuple) else (value,) for name, value in flags.items()}
        self.when = when or (lambda args: all(getattr(args, name) in values for name, values in self.flags.items()))
        self.text = text or " ".join(as_typed(name, *values) for name, values in self.flags.items())


class Default:
    """What a flag is if not given, in environments of these families (`envs.registry.family`), whatever stands behind it."""

    def __init__(self, **families: Any):
        self.families = families


MAY_CHANGE = "a continued run may change it: what is computed does not depend on it"


def as_typed(name: str, *values: Any) -> str:
    """A flag as it is typed, with any of the values."""
    name = name.replace("_", "-")
    if isinstance(values[0], tuple):
        return " ".join(map(str, (f"--{name}", *(values[0] or ("(none)",)))))
    if isinstance(values[0], bool):
        return f"--{'' if values[0] else 'no-'}{name}"
    return f"--{name} {' or '.join(map(str, values))}"


def at_least(n: int) -> Range:
    """Whole numbers from n on."""
    return Range(lambda x: x >= n, f"must be at least {n}")


ANY = Range(lambda x: True, "")
Count = Annotated[int, at_least(1)]
Positive = Annotated[float, Range(lambda x: x > 0, "must be positive")]
NotNegative = Annotated[float, Range(lambda x: x >= 0, "must be 0 or more")]
Share = Annotated[float, Range(lambda x: 0 <= x <= 1, "must lie in [0, 1]")]
InsideUnit = Annotated[float, Range(lambda x: 0 < x < 1, "must lie between 0 and 1")]
Sizes = Annotated[tuple[int, ...], Range(lambda x: x > 0, "sizes must be positive")]
Seed = Annotated[int, Range(lambda x: x >= 0, "choose a seed of 0 or more", 2**32 - 1)]  # a larger one would be cut to 32 bits
Steps = Annotated[int, Range(lambda x: x >= 1, "must be at least 1", 2**53)]
Switch = Annotated[bool, MAY_CHANGE]

ATARI = Needs("an Atari game", lambda args: family(args.env_id) == "atari")
POOL = Needs("an environment of envpool's", lambda args: family(args.env_id) in ("atari", "classic"))
DRAWN = Needs("an environment that has pictures", lambda args: args.env_id != "Catch-v0")
ON_GRIDWORLD = Needs(env_id=GRIDWORLD)
TRACKED = Needs(track=True)
LAYERS = Needs("dense layers, which --fc-layers names", lambda args: len(args.fc_layers) > 0)
WATCHED = Needs("--track-params or --track-grads", lambda args: args.track_params or args.track_grads)


@dataclass
class RunArgs:
    """Flags of a run, whatever its algorithm."""

    env_id: str = "Breakout-v5"
    """the environment: an Atari game as envpool names it; one of MinAtar's, which have defaults of their own (--help
    --env-id=Breakout-MinAtar shows them); ConfoundingGridworld-v0; or CartPole-v1, Acrobot-v1, Catch-v0"""
    reward_clip: Annotated[bool, ATARI] = True
    """Atari: train on the sign of the rewards (logged returns are never clipped)"""
    stochastic_env: Annotated[bool, ATARI] = False
    """Atari: the paper's stochastic protocol, --repeat-action-probability 0.3 --noop-max 60"""
    repeat_action_probability: Annotated[Share | None, ATARI] = None
    """Atari: probability with which each frame repeats the previous frame's action (sticky actions); if not given 0, or 0.3
    with --stochastic-env"""
    noop_max: Annotated[int | None, Range(lambda x: 1 <= x <= 1000, "must be 1 to 1000"), ATARI] = None
    """Atari: each game starts with 1 to this many no-ops, drawn uniformly; if not given 30, or 60 with --stochastic-env"""
    full_action_space: Annotated[bool, ATARI] = False
    """Atari: choose among all 18 actions, not only those that do something in the game"""
    env_step: Annotated[Literal["auto", "xla", "callback"], POOL, MAY_CHANGE] = "auto"
    """how the compiled program steps envpool: xla, within it; callback, through Python, the same transitions a little slower;
    auto takes xla where envpool offers it (Linux)"""
    overlap_rollout: Annotated[bool, POOL] = False
    """envpool: two halves of the environments take turns, the policy acting in one while the other's emulators are at work"""
    num_devices: Annotated[Count, MAY_CHANGE] = 1
    """devices of this machine that share the environments, and the work of each minibatch"""
    gridworld_n_path: Annotated[int, ON_GRIDWORLD] = 5
    """ConfoundingGridworld-v0: the column of the two choices"""
    gridworld_epsilon: Annotated[float, ON_GRIDWORLD] = 0.2
    """ConfoundingGridworld-v0: probability of the lower path"""
    seed: Seed = 1
    """seed of everything random: parameters, environments, actions, minibatches"""
    total_timesteps: Annotated[Steps, Default(minatar=5_000_000)] = 10_000_000
    """environment steps of the whole run (agent steps; an Atari step is 4 frames)"""
    logdir: Annotated[str, MAY_CHANGE] = "runs"
    """where each run has a folder of its own: logs, checkpoints, the model, and run.json, which says how it came about"""
    run_name: Annotated[str | None, MAY_CHANGE] = None
    """name of the run and of its folder; if not given, made of environment, algorithm, seed and time"""
    resume: Annotated[str, MAY_CHANGE] = "never"
    """never: the run is new; auto: continue the run of that --run-name if there is one, from its last checkpoint; or the path
    of a run's folder, or of one of its checkpoints"""
    save_every: Annotated[NotNegative, MAY_CHANGE] = 900.0
    """seconds from one checkpoint to the next (0: after every update); there is always one at the end, and after a signal"""
    keep_checkpoints: Annotated[int, at_least(0), MAY_CHANGE] = 2
    """how many of the last checkpoints are kept; 0 writes none"""
    save_model: Switch = True
    """leave the final parameters in the run's folder, for `load_run` (utils/runs/load_run.py)"""
    stop_if_not_finite: Switch = True
    """stop at a loss or a parameter that is NaN or infinite; nothing bad is saved in either case"""
    debug_nans: Switch = False
    """let JAX look for NaNs after every update, and show in a traceback which part of it computed the first (slow)"""
    track_params: bool = False
    """log norm and histogram of each layer's parameters"""
    track_grads: bool = False
    """log norm and histogram of each layer's gradient, means over an update's minibatches, before clipping"""
    track_every: Annotated[Count, WATCHED] = 100
    """updates from one such measurement to the next"""
    capture_video: Annotated[bool, MAY_CHANGE, DRAWN] = False
    """film a game now and then, into the folder's videos/ and with --track to W&B: MP4 (uv run --extra video ...), else GIFs"""
    video_every: Annotated[Steps, MAY_CHANGE, Needs(capture_video=True)] = 1_000_000
    """steps from one video to the next; there is always one at the end"""
    track: Switch = False
    """log to Weights & Biases as well (WANDB_MODE=offline keeps it on this machine)"""
    wandb_project_name: Annotated[str | None, TRACKED] = None
    """W&B project; if not given what WANDB_PROJECT says, or deep-spi"""
    wandb_entity: Annotated[str | None, TRACKED] = None
    """W&B team; if not given what WANDB_ENTITY says, or your own account"""
    wandb_group: Annotated[str | None, TRACKED] = None
    """W&B group, for runs to be averaged together; if not given what WANDB_RUN_GROUP says, or environment and algorithm"""
    wandb_tags: Annotated[tuple[str, ...], TRACKED] = ()
    """W&B tags; if not given what WANDB_TAGS says"""

    def check(self) -> None:
        """Raises UsageError for an environment that there is not, or that cannot have the size asked for; `gamma`, which the
        gridworld's rewards depend on, is the script's."""
        if family(self.env_id) is None:
            close = difflib.get_close_matches(self.env_id, env_ids(), n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else "see envs/registry.py for the ids it takes"
            raise UsageError(f"--env-id {self.env_id}: no such environment; {hint}")
        require(
            self.env_id not in minatar.GAMES or minatar.is_installed(),
            f"--env-id {self.env_id}: {minatar.NEEDED}",
        )
        for flag, path in (("logdir", self.logdir), ("resume", self.resume)):
            try:
                Path(path).expanduser()
            except RuntimeError:
                raise UsageError(f"--{flag} {path}: there is no such user, so no home folder; name another folder") from None
        name = self.run_name
        require(
            name is None or (name not in ("", "..") and Path(name).name == name and "\0" not in name),
            f"--run-name {name!r}: must be a name, not a path; --logdir says where the run's folder is",
        )
        require(
            self.resume != "auto" or name is not None,
            "--resume auto: finds a run by its --run-name, which is not given; or say --resume and the path of its folder",
        )
        require(
            name is None or self.resume in ("never", "auto"),
            f"--resume {self.resume}: names the run's folder already; leave out --run-name, or say --resume auto",
        )
        require(
            self.resume == "never" or self.keep_checkpoints > 0,
            f"--resume {self.resume}: needs checkpoints, which --keep-checkpoints 0 does not write; drop one of the two",
        )
        require(
            self.env_step != "xla" or sys.platform.startswith("linux"),
            f"--env-step xla: envpool has no such step on {sys.platform}; leave it out",
        )
        emulated, linux = family(self.env_id) in ("atari", "classic"), sys.platform.startswith("linux")
        require(
            self.num_devices == 1 or not emulated or (linux and self.env_step != "callback"),
            f"--num-devices {self.num_devices}: only envpool's own step runs on several devices, which it has on Linux; "
            + ("leave out --env-step callback" if linux else "use one"),
        )
        if self.env_id == GRIDWORLD:
            try:
                check_gridworld(self)
            except ValueError as error:
                flag = str(error).replace("_", "-")
                raise UsageError(f"--{'' if flag.startswith('gamma') else 'gridworld-'}{flag}") from None


def check_minibatches(args: Any) -> None:
    """Checks that rollouts fit into the run, and divide into minibatches.

    Raises:
        UsageError: they do not; the message names the flags to change.
    """
    steps = args.num_envs * args.num_steps
    require(
        args.minibatch_by == "env" or steps % args.num_minibatches == 0,
        f"--num-envs {args.num_envs} x --num-steps {args.num_steps} = {steps} transitions do not "
        f"divide into --num-minibatches {args.num_minibatches}: change one of the three",
    )
    require(
        args.minibatch_by == "transition" or args.num_envs % args.num_minibatches == 0,
        f"--minibatch-by env: --num-envs {args.num_envs} does not divide into --num-minibatches {args.num_minibatches}: "
        "change one of the two",
    )
    shares = args.num_devices * (1 + args.overlap_rollout)
    require(
        args.num_envs % shares == 0,
        f"--num-envs {args.num_envs}: does not divide into {shares} equal parts (--num-devices {args.num_devices}"
        f"{', two halves each' if args.overlap_rollout else ''}): change one of them",
    )
    rows, what = (args.num_envs, "environments") if args.minibatch_by == "env" else (steps, "transitions")
    rows //= args.num_minibatches
    require(
        rows % args.num_devices == 0,
        f"--num-devices {args.num_devices}: a minibatch has {rows} {what}, which do not divide into as many equal parts; take "
        "fewer --num-minibatches or more --num-envs",
    )
    require(
        args.total_timesteps >= steps,
        f"--total-timesteps {args.total_timesteps}: less than one rollout of --num-envs {args.num_envs} x --num-steps "
        f"{args.num_steps}: ask for at least {steps}",
    )
    require(
        args.total_timesteps // steps <= LARGEST,
        f"--total-timesteps {args.total_timesteps}: more than {LARGEST} updates; ask for fewer steps, or larger rollouts",
    )


def require(condition: bool, message: str) -> None:
    """Raises UsageError with the message unless the condition holds."""
    if not condition:
        raise UsageError(message)


def refuse_unread(args: Any, flags: tuple[str, ...], needed: str) -> None:
    """Raises UsageError for the first of the flags, none of which will be read, that was given a value of its own.

    `needed` says with what they would be.
    """
    default = defaults(type(args), getattr(args, "env_id", ""))
    for flag in flags:
        value = getattr(args, flag)
        require(value == default[flag], f"{as_typed(flag, value)}: is read only with {needed}; leave it out")


@functools.cache
def defaults(args_type: type, env_id: str) -> Mapping[str, Any]:
    """What each flag is if it is not given, in that environment."""
    values = {field.name: field.default for field in dataclasses.fields(args_type)} | {"env_id": env_id}
    kind = family(env_id)
    for name, hint in get_type_hints(args_type, include_extras=True).items():
        for said in annotations_of(hint):
            if isinstance(said, Default) and kind in said.families:
                values[name] = said.families[kind]
    return MappingProxyType(values)


def make_args(args_type: type, **flags: Any) -> Any:
    """The flags as the command line would give them: those that are not named have the environment's defaults."""
    return args_type(**defaults(args_type, flags.get("env_id", args_type.env_id)) | flags)


def own_defaults(args: Any) -> list[str]:
    """The flags, as they are typed, that are what they are because the environment's family has a default of its own."""
    usual, own = defaults(type(args), ""), defaults(type(args), args.env_id)
    names = [name for name in own if name != "env_id" and usual[name] != own[name] == getattr(args, name)]
    return [as_typed(name, getattr(args, name)) for name in names]


def check_flags(args: Any) -> None:
    """Checks each flag against what stands where it is declared, then what the classes of flags check themselves (a method
    `check` of their own), helpers before the script.

    Raises:
        UsageError: the first mistake found.
    """
    classes = [cls for cls in reversed(type(args).__mro__) if "check" in vars(cls)]
    if RunArgs in classes:  # whether there is such an environment decides what its flags need
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
    """What is annotated to a type, or within it."""
    if get_origin(hint) is Annotated:
        yield from hint.__metadata__
    if get_origin(hint) is not Literal:
        for inner in get_args(hint):
            yield from annotations_of(inner)


WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def parse_flags(args_type: type, argv: list[str] | None = None) -> Any:
    """The flags on the command line. Switches are typed `--track` and `--no-anneal-lr`, or as sweeps pass them,
    `--track=True`, `--anneal_lr False`. What is not typed is the environment's default."""
    env_id = args_type.env_id
    switches = {field.name for field in dataclasses.fields(args_type) if isinstance(field.default, bool)}
    typed, tokens = [], list(sys.argv[1:] if argv is None else argv)
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
            require(value.lower() in WORDS, f"{name} {value}: say True or False")
            on = on == WORDS[value.lower()]
        typed.append(f"--{'' if on else 'no-'}{flag if flag in switches else flag.removeprefix('no_')}".replace("_", "-"))
    return tyro.cli(args_type, args=typed, default=make_args(args_type, env_id=env_id))
