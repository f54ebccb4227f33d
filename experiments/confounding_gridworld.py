"""Compare the algorithms on the confounding gridworld: the exact value of the policy during training, over many seeds.

    uv run experiments/confounding_gridworld.py --output docs/confounding_gridworld

The script trains PPO, DeepMDP and Deep SPI (or the given --algorithms) with every seed. It writes a figure (.png) and its data
(.json): the exact value of the start state, and the distance between the latents of the two choices, as mean and 95% confidence
interval over seeds.

The runs equal those of `python deep_spi.py --env-id=ConfoundingGridworld-v0 ...` with the printed flags, except for a shortcut:
there are only S different observations, so the encoder is evaluated once for each of them and the latents are looked up. The
algorithm, parameters and random numbers are the same (a test compares the two).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

import json  # noqa: E402
import shlex  # noqa: E402
import time  # noqa: E402
from dataclasses import dataclass, fields, replace  # noqa: E402
from typing import Any, Literal  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jaxtyping import Array, Float, Int, UInt8  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import deep_mdp_ppo as deep_mdp  # noqa: E402
import deep_spi  # noqa: E402
import dream_spi  # noqa: E402
import ppo_atari_envpool_xla_jax_scan as ppo  # noqa: E402
from envs.confounding_gridworld import (  # noqa: E402
    CELL_PIXELS,
    ENV_ID,
    RIGHT,
    UP,
    ConfoundingGridworld,
    build_model,
    optimal_value,
    policy_value,
)
from envs.registry import make_env  # noqa: E402
from experiments.study.figures import mean_curve, styled  # noqa: E402
from utils.files import write_whole  # noqa: E402
from utils.runs.flags import check_flags, parse_command, refuse_unread, require  # noqa: E402
from utils.runs.launch import describe_device, run_main  # noqa: E402
from utils.runs.outputs import check_output  # noqa: E402

OF_DREAMS = ("dream_learning_rate", "dream_heads_learning_rate", "dream_actor_after")
SCRIPTS = {"PPO": ppo, "DeepMDP": deep_mdp, "Deep SPI": deep_spi, "DreamSPI": dream_spi}
VALUE, DISTANCE, DISTINCT = "charts/init_value", "charts/representation_distance", "charts/distinct_latents"


@dataclass
class Args:
    """Compare the algorithms on the confounding gridworld. Flags after the first three go to the scripts that have them."""

    output: str = "confounding_gridworld"
    """path of the figure (.png) and its data (.json), without an extension"""
    seeds: tuple[int, ...] = tuple(range(101, 111))
    """seeds of each algorithm; the hyperparameters were tuned on seeds 1, 2 and 3"""
    algorithms: tuple[str, ...] = ("PPO", "DeepMDP", "Deep SPI")
    """algorithms to train, of PPO, DeepMDP, Deep SPI, DreamSPI"""
    latent: Literal["categorical", "continuous"] = "categorical"
    """type of latent, for all algorithms"""
    num_categories: int = 2
    """number of variables of a categorical latent"""
    num_classes: int = 4
    """number of classes of each variable"""
    transition_loss_coef: float = 0.01
    """c_P: weight of the transition loss"""
    reward_loss_coef: float = 0.1
    """c_R: weight of the reward loss"""
    clip_coef: float = 0.1
    """eps: how far a policy's update may move the probability ratio from 1"""
    dream_learning_rate: float = 1e-3
    """DreamSPI: learning rate of the encoder and the world model"""
    dream_heads_learning_rate: float = 1e-4
    """DreamSPI: learning rate of the actor and the critic"""
    dream_actor_after: int = 40_000
    """DreamSPI: environment steps before the actor starts to learn"""
    total_timesteps: int = 204_800
    """environment steps of each run"""
    gridworld_n_path: int = 5
    """size of the gridworld: the column of the two choices"""
    gridworld_epsilon: float = 0.2
    """probability of the lower path"""


class OncePerCell:
    """An encoder for observations that are cell indices. It is evaluated once per cell."""

    def __init__(self, encoder: Any, frames: Array):
        self.encoder, self.frames = encoder, frames

    def init_with_output(self, key: Array, cell: Int[Array, " N"]) -> tuple[Float[Array, "N *z"], Any]:
        """Return the latents of the cells, and the parameters that the encoder itself gets from the same key."""
        z, params = self.encoder.init_with_output(key, self.frames)
        return z[cell], params

    def apply(self, params: Any, cell: Int[Array, " N"]) -> Float[Array, "N *z"]:
        """Return the latents of the cells."""
        return self.encoder.apply(params, self.frames)[cell]


def script_args(name: str, args: Args) -> Any:
    """Return the flags of the script `name`."""
    ours = ("output", "seeds", "algorithms", *OF_DREAMS)
    flags = {field.name: getattr(args, field.name) for field in fields(Args) if field.name not in ours}
    if name == "DreamSPI":
        flags |= {flag.removeprefix("dream_"): getattr(args, flag) for flag in OF_DREAMS}
    if name == "PPO":
        del flags["transition_loss_coef"], flags["reward_loss_coef"]
    if args.latent == "continuous":
        del flags["num_categories"], flags["num_classes"]
    return SCRIPTS[name].Args(env_id=ENV_ID, **flags)


def command_of(name: str, args: Args) -> str:
    """Return the command that trains one algorithm without the shortcut, up to its seed."""
    defaults = vars(SCRIPTS[name].Args())
    flags = {k: v for k, v in vars(script_args(name, args)).items() if v != defaults[k]}
    return shlex.join([f"{SCRIPTS[name].__name__}.py", *(f"--{k.replace('_', '-')}={v}" for k, v in flags.items())])


def check(args: Args) -> None:
    """Check the flags of all runs.

    Raises:
        UsageError: the first mistake found.
    """
    unknown = set(args.algorithms) - set(SCRIPTS)
    require(not unknown, f"--algorithms {' '.join(sorted(unknown))}: choose from {', '.join(SCRIPTS)}")
    distinct = len(set(args.algorithms)) == len(args.algorithms) > 0
    require(distinct, "--algorithms: name at least one, and each once")
    seeds = set(args.seeds)
    require(len(seeds) == len(args.seeds) > 1 and min(seeds) >= 0, "--seeds: name at least two distinct, nonnegative seeds")
    if args.latent == "continuous":
        refuse_unread(args, ("num_categories", "num_classes"), "--latent categorical")
    if "DreamSPI" not in args.algorithms:
        refuse_unread(args, OF_DREAMS, "--algorithms DreamSPI")
    for name in args.algorithms:
        check_flags(replace(script_args(name, args), seed=max(args.seeds)))


def make_cells(args: Any) -> tuple[ConfoundingGridworld, UInt8[Array, "S 1 84 84"]]:
    """Return a script's environment with cell indices as observations, and the frame of each index."""
    env = make_env(args)
    frames = jnp.asarray(env.frames)
    env.frames = np.arange(len(frames))
    return env, frames


def train(name: str, args: Args) -> dict[str, np.ndarray]:
    """Train with every seed. Return the metrics of every iteration, [seeds, iterations], and the steps after each."""
    script, flags = SCRIPTS[name], script_args(name, args)
    check_flags(flags)
    env, frames = make_cells(flags)
    agent, optimizer = script.make_agent(flags, env.num_actions, env.obs_parts), script.make_optimizer(flags)
    agent = agent._replace(encoder=OncePerCell(agent.encoder, frames))
    steps_per_iteration = flags.num_envs * flags.num_steps
    row = np.cumsum(~env.model.terminal) - 1  # row of each cell in the policy matrix

    @jax.jit
    def run(state):
        def iteration(state, _):
            state, metrics = script.learn(*script.rollout(state, env, agent, flags), env, agent, optimizer, flags)
            policy = metrics["charts/policy_matrix"][::CELL_PIXELS, ::CELL_PIXELS] / 255.0
            up = {f"up, {where}": policy[row[i], UP] for where, i in zip(("above", "below"), env.model.choices, strict=True)}
            return state, {key: metrics[key] for key in (VALUE, DISTANCE, DISTINCT)} | up

        return jax.lax.scan(iteration, state, None, length=flags.total_timesteps // steps_per_iteration)[1]

    runs = []
    for seed in args.seeds:
        seeded = replace(flags, seed=seed)
        runs.append(jax.device_get(run(script.init_state(seeded, make_cells(seeded)[0], agent, optimizer))))
    curves = {key: np.stack([r[key] for r in runs]) for key in runs[0]}
    return curves | {"steps": steps_per_iteration * (1 + np.arange(curves[VALUE].shape[1]))}


@styled()
def draw(curves: dict[str, dict[str, np.ndarray]], args: Args, optimum: float, right: float) -> None:
    """Draw the exact values of the start state above the distances between latents; thin lines are single seeds."""
    figure = Figure(figsize=(7, 5.5))
    above, beneath = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for name, curve in curves.items():
        for axes, key in ((above, VALUE), (beneath, DISTANCE)):
            mean, half = mean_curve(curve[key])
            (line,) = axes.plot(curve["steps"], mean, label=name)
            axes.fill_between(curve["steps"], mean - half, mean + half, color=line.get_color(), alpha=0.15, linewidth=0)
            axes.plot(curve["steps"], curve[key].T, color=line.get_color(), alpha=0.35, linewidth=0.6)
    for value, what in ((optimum, "optimum"), (right, "always right")):
        above.axhline(value, color="gray", linestyle=":")
        above.text(1.01, value, f"{what}, {value:.2f}", transform=above.get_yaxis_transform(), va="center", color="gray")
    above.set(ylabel="exact value of the start state")
    above.legend(loc="lower right")
    beneath.set(xlabel="environment steps", ylabel="distance between the\nchoices' latents")
    figure.savefig(f"{args.output}.png", dpi=120, metadata={"Software": None})


def main(args: Args) -> None:
    """Train the algorithms, draw the figure, and write the data."""
    check(args)
    if args.algorithms == ("PPO",):
        refuse_unread(args, ("transition_loss_coef", "reward_loss_coef"), "--algorithms with a world model")
    paths = [check_output(f"{args.output}{ending}", "--output", make_parent=True) for ending in (".png", ".json")]
    args = replace(args, output=str(paths[0].with_suffix("")))
    gamma = deep_spi.Args().gamma
    model = build_model(args.gridworld_n_path, args.gridworld_epsilon, gamma)
    optimum = optimal_value(model, gamma)[model.start]
    right = np.zeros_like(model.reward)
    right[:, RIGHT] = 1.0
    right = policy_value(model, jnp.asarray(right), gamma)[model.start]
    print(describe_device())
    curves, summary = {}, {}
    for name in args.algorithms:
        command = command_of(name, args)
        started = time.perf_counter()
        curves[name] = train(name, args)
        final = curves[name][VALUE][:, -1]
        mean, half = (float(x[-1]) for x in mean_curve(curves[name][VALUE]))
        up = [np.median(curves[name][f"up, {where}"][:, -1]) for where in ("above", "below")]
        distance, distinct = (np.median(curves[name][key][:, -1]) for key in (DISTANCE, DISTINCT))
        seconds = (time.perf_counter() - started) / len(args.seeds)
        print(
            f"{command}\n"
            f"  final value: median {np.median(final):.3f}, mean {mean:.3f} +- {half:.3f}, "
            f"from {final.min():.3f} to {final.max():.3f}; medians: distance {distance:.2f}, {distinct:.0f} distinct latents, "
            f"P(up) {up[0]:.2f} above, {up[1]:.2f} below; {seconds:.0f} s per seed",
            flush=True,
        )
        summary[name] = {
            "command": command,
            "seeds": args.seeds,
            "final value": {"median": float(np.median(final)), "mean": mean, "95% interval": half, "seeds": final.tolist()},
            "final distinct latents": curves[name][DISTINCT][:, -1].tolist(),
            "steps": curves[name]["steps"].tolist(),
        } | {
            key: {"mean": [round(float(x), 4) for x in m], "95% interval": [round(float(x), 4) for x in h]}
            for key in (VALUE, DISTANCE, DISTINCT, "up, above", "up, below")
            for m, h in [mean_curve(curves[name][key])]
        }
        # one line per curve; json.dumps with an indent puts every number on its own line
        lines = [
            f'"{name}": {{\n' + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in of.items()) + "\n}"
            for name, of in summary.items()
        ]
        device = json.dumps(describe_device().splitlines()[0].removeprefix("device: "))
        write_whole(paths[1], (f'{{"device": {device},\n' + ",\n".join(lines) + "\n}\n").encode())
    draw(curves, args, float(optimum), float(right))
    print(f"written: {args.output}.png, {args.output}.json")


if __name__ == "__main__":
    run_main(lambda: main(parse_command(Args)), out_of_memory="out of memory: name fewer --seeds at a time")
