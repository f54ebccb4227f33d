"""The algorithms on the confounding gridworld: the exact value of the policy over the steps, for many seeds.

    uv run experiments/confounding_gridworld.py --output docs/confounding_gridworld

trains PPO, DeepMDP and Deep SPI (or what --algorithms names) from every seed, and writes a figure (.png) and its numbers
(.json): the exact value of the start, and the distance of the latents of the two choices, mean and 95% confidence interval over
the seeds.

The runs are those of `python deep_spi.py --env-id=ConfoundingGridworld-v0 ...` with the flags printed first, but for one short
cut: there are only S different observations, so the encoder is evaluated once for each and its latents are looked up. The
algorithm, its parameters and its random numbers are the same (a test compares the two).
"""

import json
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro
from jaxtyping import Array, Float, Int, UInt8
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent))

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
from utils.runs.flags import UsageError, check_flags, refuse_unread, require  # noqa: E402
from utils.runs.launch import describe_device  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

OF_DREAMS = ("dream_learning_rate", "dream_heads_learning_rate", "dream_actor_after")
SCRIPTS = {"PPO": ppo, "DeepMDP": deep_mdp, "Deep SPI": deep_spi, "DreamSPI": dream_spi}
VALUE, DISTANCE, DISTINCT = "charts/init_value", "charts/representation_distance", "charts/distinct_latents"


@dataclass
class Args:
    """Flags of the benchmark. All but the first three go to the scripts."""

    output: str = "confounding_gridworld"
    """where the figure (.png) and its numbers (.json) go"""
    seeds: tuple[int, ...] = tuple(range(101, 111))
    """seeds of each algorithm; the setting was searched on seeds 1, 2 and 3"""
    algorithms: tuple[str, ...] = ("PPO", "DeepMDP", "Deep SPI")
    """which of PPO, DeepMDP, Deep SPI, DreamSPI"""
    latent: Literal["categorical", "continuous"] = "categorical"
    """of all algorithms"""
    num_categories: int = 2
    """variables of the categorical code"""
    num_classes: int = 4
    """classes of each"""
    transition_loss_coef: float = 0.01
    """c_P"""
    reward_loss_coef: float = 0.1
    """c_R"""
    dream_learning_rate: float = 1e-3
    """DreamSPI's learning rate of encoder and world model"""
    dream_heads_learning_rate: float = 1e-4
    """DreamSPI's learning rate of actor and critic"""
    dream_actor_after: int = 40_000
    """steps for which DreamSPI's actor waits for the model"""
    total_timesteps: int = 204_800
    """steps of each run"""
    gridworld_n_path: int = 5
    """size of the gridworld"""
    gridworld_epsilon: float = 0.2
    """probability of the lower path"""


class OncePerCell:
    """The encoder, for observations that are indices of cells: evaluated once for each cell there is."""

    def __init__(self, encoder: Any, frames: Array):
        self.encoder, self.frames = encoder, frames

    def init_with_output(self, key: Array, cell: Int[Array, " N"]) -> tuple[Float[Array, "N *z"], Any]:
        """As the encoder's: the same parameters for the same key."""
        z, params = self.encoder.init_with_output(key, self.frames)
        return z[cell], params

    def apply(self, params: Any, cell: Int[Array, " N"]) -> Float[Array, "N *z"]:
        """The latents of the cells."""
        return self.encoder.apply(params, self.frames)[cell]


def script_args(name: str, args: Args) -> Any:
    """The flags of the script `name`."""
    ours = ("output", "seeds", "algorithms", *OF_DREAMS)
    flags = {key: value for key, value in vars(args).items() if key not in ours}
    if name == "DreamSPI":
        flags |= {flag.removeprefix("dream_"): getattr(args, flag) for flag in OF_DREAMS}
    if name == "PPO":
        del flags["transition_loss_coef"], flags["reward_loss_coef"]
    if args.latent == "continuous":
        del flags["num_categories"], flags["num_classes"]
    return SCRIPTS[name].Args(env_id=ENV_ID, **flags)


def make_cells(args: Any) -> tuple[ConfoundingGridworld, UInt8[Array, "S 1 84 84"]]:
    """A script's environment, with the index of its cell for each observation, and the observations by index."""
    env = make_env(args)
    frames = jnp.asarray(env.frames)
    env.frames = np.arange(len(frames))
    return env, frames


def train(name: str, args: Args) -> dict[str, np.ndarray]:
    """Trains from every seed. Returns metrics of every iteration, [seeds, iterations], and the steps after each."""
    script, flags = SCRIPTS[name], script_args(name, args)
    check_flags(flags)
    env, frames = make_cells(flags)
    agent, optimizer = script.make_agent(flags, env.num_actions), script.make_optimizer(flags)
    agent = agent._replace(encoder=OncePerCell(agent.encoder, frames))
    steps_per_iteration = flags.num_envs * flags.num_steps
    row = np.cumsum(~env.model.terminal) - 1  # of each cell in the policy matrix

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


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the seeds (axis 0), and half the width of its 95% confidence interval (Student's t)."""
    n = len(values)
    return values.mean(axis=0), stats.t.ppf(0.975, n - 1) * values.std(axis=0, ddof=1) / n**0.5


def draw(curves: dict[str, dict[str, np.ndarray]], args: Args, optimum: float, right: float) -> None:
    """The figure: exact start values above, representation distances beneath; thin lines are single seeds."""
    figure, (above, beneath) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1))
    for name, curve in curves.items():
        for axes, key in ((above, VALUE), (beneath, DISTANCE)):
            mean, half = interval(curve[key])
            (line,) = axes.plot(curve["steps"], mean, label=name)
            axes.fill_between(curve["steps"], mean - half, mean + half, color=line.get_color(), alpha=0.15, linewidth=0)
            axes.plot(curve["steps"], curve[key].T, color=line.get_color(), alpha=0.35, linewidth=0.6)
    for value, what in ((optimum, "optimum"), (right, "always right")):
        above.axhline(value, color="gray", linestyle=":")
        above.annotate(f"{what}, {value:.2f}", (0, value), va="bottom", color="gray")
    above.set(ylabel="exact value of the start")
    above.legend(loc="lower right")
    beneath.set(xlabel="environment steps", ylabel="distance of the\nchoices' latents")
    figure.savefig(f"{args.output}.png", dpi=120, bbox_inches="tight")


def main(args: Args) -> None:
    """Trains, draws, and writes."""
    unknown = set(args.algorithms) - set(SCRIPTS)
    require(not unknown, f"--algorithms {' '.join(sorted(unknown))}: choose from {', '.join(SCRIPTS)}")
    require(len(args.algorithms) > 0, "--algorithms: name at least one")
    seeds = set(args.seeds)
    require(len(seeds) == len(args.seeds) > 1 and min(seeds) >= 0, "--seeds: name two or more, all different, of 0 or more")
    if args.latent == "continuous":
        refuse_unread(args, ("num_categories", "num_classes"), "--latent categorical")
    if "DreamSPI" not in args.algorithms:
        refuse_unread(args, OF_DREAMS, "--algorithms DreamSPI")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    gamma = deep_spi.Args().gamma
    model = build_model(args.gridworld_n_path, args.gridworld_epsilon, gamma)
    optimum = optimal_value(model, gamma)[model.start]
    right = np.zeros_like(model.reward)
    right[:, RIGHT] = 1.0
    right = policy_value(model, jnp.asarray(right), gamma)[model.start]
    print(describe_device())
    curves, summary = {}, {}
    for name in args.algorithms:
        defaults = vars(SCRIPTS[name].Args())
        flags = {k: v for k, v in vars(script_args(name, args)).items() if v != defaults[k]}
        command = shlex.join([f"{SCRIPTS[name].__name__}.py", *(f"--{k.replace('_', '-')}={v}" for k, v in flags.items())])
        started = time.perf_counter()
        curves[name] = train(name, args)
        final = curves[name][VALUE][:, -1]
        mean, half = (float(x[-1]) for x in interval(curves[name][VALUE]))
        up = [np.median(curves[name][f"up, {where}"][:, -1]) for where in ("above", "below")]
        distance, distinct = (np.median(curves[name][key][:, -1]) for key in (DISTANCE, DISTINCT))
        seconds = (time.perf_counter() - started) / len(args.seeds)
        print(
            f"{command}\n"
            f"  final value: median {np.median(final):.3f}, mean {mean:.3f} +- {half:.3f}, "
            f"from {final.min():.3f} to {final.max():.3f}; medians: distance {distance:.2f}, {distinct:.0f} codes, "
            f"up with probability {up[0]:.2f} above, {up[1]:.2f} below; {seconds:.0f} s a seed",
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
            for m, h in [interval(curves[name][key])]
        }
    draw(curves, args, float(optimum), float(right))
    # a line for each algorithm and each curve: indented, every number would stand on a line of its own
    lines = [
        f'"{name}": {{\n' + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in of.items()) + "\n}"
        for name, of in summary.items()
    ]
    device = json.dumps(describe_device().splitlines()[0].removeprefix("device: "))
    Path(f"{args.output}.json").write_text(f'{{"device": {device},\n' + ",\n".join(lines) + "\n}\n")
    print(f"written: {args.output}.png, {args.output}.json")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (UsageError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
