"""What the latents of trained runs are like, and what their world models know: where a world model helps, and where it hurts.

    uv run benchmarks/representations.py runs/minatar --output representations.csv

reads the final networks of runs (folders of runs, or of studies), lets them play on for a while, and measures on those steps

- `effective_rank` of the latents: how many directions they use (Roy & Vetterli, 2007);
- `dormant`: the share of their units that are silent nearly everywhere (Sokar et al., 2023);
- `probe`: the share of the observation's variance that can be read off a latent linearly, in environments held out;
- `moves`: the mean square by which a latent moves in a step, over the latents' variance;
- `transition_skill`: 1 - (squared error of the predicted mean) / (squared movement): 1 right, 0 no better than no movement;
- `noise`: the share of a sample's squared error that its noise makes;
- `reward_r2`: the share of the rewards' variance that the reward network explains;
- `utility_mean`, `utility_std`: of c_R l_R + c_P l_P, what the world model takes off an advantage, whose deviation is 1;
- `gradient_share`: the length of what the world model's losses add to the encoder's gradient, over that of all else in it.

It prints means over seeds; the table has a row for each run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

import importlib  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from typing import Annotated, Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import tyro  # noqa: E402
from jaxtyping import Array, Float, Num  # noqa: E402

from utils.losses import smooth_l1_loss  # noqa: E402
from utils.runs.checkpoints import write_csv  # noqa: E402
from utils.runs.flags import require  # noqa: E402
from utils.runs.launch import run_main  # noqa: E402
from utils.runs.load_run import LoadedRun, read_run  # noqa: E402
from utils.study.records import OF_EPISODES, labels, read_folder, run_folders  # noqa: E402
from utils.world_model import transition_loss  # noqa: E402

MEASURES = ("effective_rank", "dormant", "probe", "moves")
OF_MODEL = ("transition_skill", "noise", "reward_r2", "utility_mean", "utility_std", "gradient_share")
SILENT = 0.025  # of the mean activity of a layer's units
RIDGE = 1e-3  # of the mean variance of the latents' numbers
SIDE = 12  # of an image that a probe reads


@dataclass
class Args:
    """Flags of the measurement."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of runs or of studies"""
    output: Path = Path("representations.csv")
    """the table"""
    num_envs: int = 64
    """environments that play at once"""
    num_steps: int = 128
    """steps of each that are measured, after as many that are not"""
    seed: int = 1
    """of environments and draws"""


def effective_rank(z: Float[np.ndarray, "N d"]) -> float:
    """exp of the entropy of the singular values of the centred latents, taken as shares of their sum (Roy & Vetterli, 2007):
    d where all directions are alike, 1 where there is one."""
    values = np.linalg.svd(z - z.mean(0), compute_uv=False)
    shares = values[values > 1e-6 * values[0]] / values[values > 1e-6 * values[0]].sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def dormant_share(z: Float[np.ndarray, "N d"]) -> float:
    """Units whose mean activity is at most `SILENT` of the mean over units (Sokar et al., 2023, definition 3.1)."""
    activity = np.abs(z).mean(0)
    return float(np.mean(activity <= SILENT * activity.mean()))


def probe(z: Float[np.ndarray, "N d"], y: Float[np.ndarray, "N k"], new_z: Any, new_y: Any) -> float:
    """Share of the variance of `new_y` that the ridge regression of y on z explains."""
    mean_z, mean_y = z.mean(0), y.mean(0)
    z, y = z - mean_z, y - mean_y
    gram = z.T @ z
    gram[np.diag_indices_from(gram)] += max(RIDGE * np.trace(gram) / len(gram), 1e-12)
    error = new_y - mean_y - (new_z - mean_z) @ np.linalg.solve(gram, z.T @ y)
    return 1.0 - float(np.sum(error**2) / np.sum((new_y - mean_y) ** 2))


def readable(obs: Num[np.ndarray, "N *obs"]) -> Float[np.ndarray, "N k"]:
    """What a probe is to read: the observation, or of a stack of images the newest, in `SIDE` x `SIDE` means."""
    if obs.ndim == 4 and obs.dtype == np.uint8 and obs.shape[-1] % SIDE == 0:
        side = obs.shape[-1] // SIDE
        obs = obs[:, -1].reshape(-1, SIDE, side, SIDE, side).mean((2, 4)) / 255.0
    return obs.reshape(len(obs), -1).astype(np.float32)


def play_on(script: Any, run: LoadedRun, key: jax.Array) -> Any:
    """A rollout of the run's policy, after one that is thrown away: the environments all start at once."""
    env_state, obs = run.env.reset()
    state = script.TrainState(**dict.fromkeys(script.TrainState._fields))
    state = state._replace(params=run.params, env_state=env_state, obs=obs)
    rollout = jax.jit(lambda state, key: script.rollout(state, key, run.env, run.agent, run.args))
    for k in jax.random.split(key):
        state, steps = rollout(state, k)
    return steps


def measure_model(script: Any, run: LoadedRun, steps: Any, z: Float[Array, "T+1 B *z"], key: jax.Array) -> dict[str, float]:
    """Of the world model, on the steps of a rollout."""
    args, agent = run.args, run.agent
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    now, after, action, reward, valid = map(flat, (z[:-1], z[1:], steps.action, steps.reward, steps.valid))
    everywhere = jnp.zeros(args.num_envs, int), jnp.arange(args.num_envs)

    @jax.jit
    def predict(params):
        predicted = agent.transition.apply(params.transition, now, action)
        rewards = agent.reward.apply(params.reward, now, action)
        taken_off = args.reward_loss_coef * smooth_l1_loss(rewards - reward)
        taken_off += args.transition_loss_coef * transition_loss(predicted, after, key, args)
        return predicted.mean(), predicted.sample(key), rewards, taken_off

    @jax.jit
    def gradient(params, reward_loss_coef, transition_loss_coef):
        weighted = replace(
            args, reward_loss_coef=reward_loss_coef, transition_loss_coef=transition_loss_coef, minibatch_by="env"
        )
        batch = script.gather(steps, script.compute_gae(steps, args.gamma, args.gae_lambda), *everywhere, weighted)
        return jax.grad(lambda params: script.loss_fn(params, batch, key, agent, weighted)[0])(params).encoder

    mean, sample, rewards, taken_off = jax.tree.map(np.asarray, predict(run.params))
    now, after, reward, valid = map(np.asarray, (now, after, reward, valid))
    without = gradient(run.params, 0.0, 0.0)
    added = jax.tree.map(np.subtract, gradient(run.params, args.reward_loss_coef, args.transition_loss_coef), without)
    share = lambda error, whole: 1.0 - float(np.sum(error[valid] ** 2) / np.sum(whole[valid] ** 2))  # noqa: E731
    return {
        "transition_skill": share(mean - after, now - after),
        "noise": 1.0 - share(sample - mean, sample - after),
        "reward_r2": share(rewards - reward, reward - reward[valid].mean()),
        "utility_mean": float(taken_off[valid].mean()),
        "utility_std": float(taken_off[valid].std()),
        "gradient_share": float(optax.tree.norm(added) / optax.tree.norm(without)),
    }


def measure(run: LoadedRun, key: jax.Array) -> dict[str, float]:
    """All `MEASURES` of a run, and if it has a world model those `OF_MODEL`."""
    script = importlib.import_module(run.progress["script"])
    script = importlib.import_module("deep_spi") if script.__name__ == "dream_spi" else script  # whose losses it has
    rollout_key, model_key = jax.random.split(key)
    steps = play_on(script, run, rollout_key)
    encode = jax.jit(lambda params, obs: jax.lax.map(lambda x: run.agent.encoder.apply(params, x), obs))
    z = encode(run.params.encoder, steps.obs)
    latents, obs = np.asarray(z[:-1]), np.asarray(steps.obs[:-1])
    half = latents.shape[1] // 2
    parts = [latents[:, :half], obs[:, :half], latents[:, half:], obs[:, half:]]
    z_of, obs_of, new_z, new_obs = (x.reshape(-1, *x.shape[2:]) for x in parts)
    z_of, new_z = (x.reshape(len(x), -1) for x in (z_of, new_z))
    valid = np.asarray(steps.valid)
    moved = np.asarray(z[1:] - z[:-1]).reshape(*valid.shape, -1)[valid]
    flat = latents.reshape(-1, z_of.shape[1])
    found = {
        "effective_rank": effective_rank(flat),
        "dormant": dormant_share(flat),
        "probe": probe(z_of, readable(obs_of), new_z, readable(new_obs)),
        "moves": float(np.mean(np.sum(moved**2, 1)) / np.sum(flat.var(0))),
    }
    if hasattr(run.agent, "transition"):
        found |= measure_model(script, run, steps, z, model_key)
    return found


def main(args: Args) -> None:
    """Measures, prints and writes."""
    require(args.num_envs > 1, f"--num-envs {args.num_envs}: the probe needs two, one of them held out")
    require(args.num_steps > 0, f"--num-steps {args.num_steps}: must be at least 1")
    require(args.output.parent.is_dir(), f"--output {args.output}: there is no folder {args.output.parent}; make it first")
    records = []
    for path in args.runs:
        require(path.is_dir(), f"{path}: there is no such folder")
        for folder in run_folders(path):
            record, problems = read_folder(folder, OF_EPISODES[0])
            for problem in problems:
                print(f"*** {problem} ***")
            if record is not None and not record.is_finished:
                print(f"*** {folder}: is not finished, left out ***")
            elif record is not None:
                records.append(record)
    require(len(records) > 0, "no finished runs")
    rows, measured = [], {}
    for record, label in zip(records, labels(records), strict=True):
        run = read_run(record.source, num_envs=args.num_envs, num_steps=args.num_steps, num_minibatches=1, seed=args.seed)
        found = measure(run, jax.random.key(args.seed))
        values = [found.get(name) for name in (*MEASURES, *OF_MODEL)]
        rows.append(
            (record.script, record.env_id, record.flags, record.seed, *("" if v is None else f"{v:.4g}" for v in values))
        )
        measured.setdefault((record.env_id, label), []).append([np.nan if v is None else v for v in values])
        write_csv(args.output, ("script", "env_id", "flags", "seed", *MEASURES, *OF_MODEL), rows)
    print("| | | " + " | ".join((*MEASURES, *OF_MODEL)) + " |\n" + "| --- " * (2 + len(MEASURES) + len(OF_MODEL)) + "|")
    for (env_id, label), values in measured.items():
        cells = ["-" if np.isnan(mean) else f"{mean:.3g}" for mean in np.mean(values, axis=0)]
        print(f"| {env_id} | {label} | " + " | ".join(cells) + " |")
    print(f"written: {args.output}")


if __name__ == "__main__":
    run_main(lambda: main(tyro.cli(Args)))
