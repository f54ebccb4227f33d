"""Measure the latents and world models of trained runs: where a world model helps, and where it hurts.

    uv run experiments/representations.py runs/minatar --output representations.csv

The script reads finished runs (folders of runs or of studies), lets their final networks act, and measures on the last steps:

- `effective_rank` of the latents: the number of directions that they use (Roy & Vetterli, 2007);
- `dormant`: the fraction of latent units with almost no activity (Sokar et al., 2023);
- `probe`: the fraction of the variance of observations (for frames: the newest, at 12 x 12) that a linear map of the latents
  explains, in environments that were not used to fit the map;
- `moves`: the mean squared change of a latent in one step, divided by the latents' variance;
- `transition_skill`: 1 - (squared error of the predicted mean) / (squared change): 1 is perfect, 0 equals predicting no change;
- `noise`: the fraction of a predicted sample's squared error that is due to sampling noise;
- `reward_r2`: the fraction of the rewards' variance that the reward network explains;
- `model_loss`, `model_loss_std`: mean and standard deviation of c_R l_R + c_P l_P over transitions; Deep SPI subtracts this
  loss from advantages of standard deviation 1;
- `gradient_share`: the norm of these losses' gradient in the encoder, divided by the norm of the other losses' gradient.

Reset steps are excluded. Means over seeds are printed. The table has one row per run; a cell is empty if the run has no world
model or the steps do not determine the measure (for example, all rewards are equal).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

import importlib  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from types import ModuleType  # noqa: E402
from typing import Annotated, Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import tyro  # noqa: E402
from jaxtyping import Array, Float  # noqa: E402

import deep_spi  # noqa: E402
from experiments.study.latent_measures import of_latents, of_predictions  # noqa: E402
from experiments.study.page import Table  # noqa: E402
from experiments.study.records import LEFT_OUT, WANDB, RunRecord, check_table, labels, read_runs  # noqa: E402
from utils.dreams.discriminator import transition_distance  # noqa: E402
from utils.files import write_csv  # noqa: E402
from utils.losses import smooth_l1_loss  # noqa: E402
from utils.runs.flags import UsageError, parse_command, require  # noqa: E402
from utils.runs.launch import run_main  # noqa: E402
from utils.runs.load_run import LoadedRun, read_run  # noqa: E402
from utils.runs.outputs import check_output  # noqa: E402

MEASURES = ("effective_rank", "dormant", "probe", "moves", "transition_skill", "noise", "reward_r2")
MEASURES += ("model_loss", "model_loss_std", "gradient_share")
COLUMNS = ("script", "env_id", "flags", "seed", "step", *MEASURES)
NEEDED = ("TrainState", "rollout", "compute_gae", "gather")  # functions and classes of a script


@dataclass
class Args:
    """Measure the latents and world models of trained runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of runs or of studies"""
    output: Path = Path("representations.csv")
    """path of the table (.csv), one row per run; rows of other runs stay"""
    num_envs: int = 64
    """number of parallel environments"""
    num_steps: int = 128
    """measured steps per environment"""
    skip: int = 2000
    """steps per environment to discard first, so that games are at different stages"""
    seed: int = 1
    """seed of environments and sampling; no seed gives the random numbers of training"""


def play(script: ModuleType, run: LoadedRun, skip: int, key: jax.Array) -> Any:
    """Return a rollout of the run's policy, after discarding `skip` steps (rounded up to whole rollouts)."""
    env_state, obs = run.env.reset()
    state = script.TrainState(**dict.fromkeys(script.TrainState._fields))
    state = state._replace(params=run.params, env_state=env_state, obs=obs, key=key)
    rollout = jax.jit(lambda state: script.rollout(state, run.env, run.agent, run.args))
    for _ in range(1 + -(-skip // run.args.num_steps)):
        state, steps = rollout(state)
    return steps


def measure_model(
    script: ModuleType, run: LoadedRun, steps: Any, z: Float[Array, "T+1 B *z"], key: jax.Array
) -> dict[str, float | None]:
    """Return the measures of the world model on the steps of a rollout."""
    args, agent = run.args, run.agent
    loss_fn = getattr(script, "loss_fn", deep_spi.loss_fn)  # DreamSPI uses Deep SPI's on real data
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    now, after, action, reward, valid = map(flat, (z[:-1], z[1:], steps.action, steps.reward, steps.valid))

    def distance_of(params, z, action):
        return transition_distance(getattr(agent, "discriminator", None), getattr(params, "discriminator", None), z, action)

    @jax.jit
    def predict(params, now, after, action, reward):
        predicted = agent.transition.apply(params.transition, now, action)
        rewards = agent.reward.apply(params.reward, now, action)
        losses = args.transition_loss_coef * distance_of(params, now, action)(predicted, after, key, args)
        losses += args.reward_loss_coef * smooth_l1_loss(rewards - reward)
        return predicted.mean(), predicted.sample(key), rewards, losses

    @jax.jit
    def gradient(params, steps, coefficients):
        weighted = replace(args, minibatch_by="env", **coefficients)
        advantages = script.compute_gae(steps, args.gamma, args.gae_lambda)
        batch = script.gather(steps, advantages, jnp.zeros(args.num_envs, int), jnp.arange(args.num_envs), weighted)

        def loss(params):
            of_run = {}
            if getattr(agent, "discriminator", None) is not None:
                z = jax.lax.stop_gradient(agent.encoder.apply(params.encoder, batch.obs)[: batch.action.shape[0]])
                of_run["distance"] = distance_of(params, z, batch.action)
            return loss_fn(params, batch, key, agent, weighted, **of_run)[0]

        return jax.grad(loss)(params).encoder

    predicted = jax.tree.map(np.asarray, predict(run.params, now, after, action, reward))
    now, after, reward, mean, sample, rewards, losses = (np.asarray(x)[valid] for x in (now, after, reward, *predicted))
    own = {name: getattr(args, name) for name in ("reward_loss_coef", "transition_loss_coef")}
    without = gradient(run.params, steps, dict.fromkeys(own, 0.0))
    added = jax.tree.map(jnp.subtract, gradient(run.params, steps, own), without)
    return of_predictions(now, after, mean, sample, reward, rewards) | {
        "model_loss": float(losses.mean()),
        "model_loss_std": float(losses.std()),
        "gradient_share": float(optax.tree.norm(added) / optax.tree.norm(without)),
    }


def measure(run: LoadedRun, skip: int, key: jax.Array) -> dict[str, float | None]:
    """Return all `MEASURES` of a run; None for those that do not apply.

    Raises:
        UsageError: its script lacks a name in `NEEDED`.
    """
    script = importlib.import_module(run.progress["script"])
    lacking = [name for name in NEEDED if not hasattr(script, name)]
    require(not lacking, f"{script.__name__}.py has no {', '.join(lacking)}")
    play_key, model_key = jax.random.split(key)
    steps = play(script, run, skip, play_key)
    encode = lambda t: run.agent.encoder.apply(run.params.encoder, steps.obs[t])  # noqa: E731
    z = jax.jit(lambda: jax.lax.map(encode, jnp.arange(len(steps.obs))))()
    found = dict.fromkeys(MEASURES) | of_latents(*map(np.asarray, (steps.valid, z, steps.obs)))
    return found | (measure_model(script, run, steps, z, model_key) if hasattr(run.agent, "transition") else {})


def finished_runs(sources: tuple[Path, ...]) -> list[RunRecord]:
    """Return the records of the finished runs in these folders, and print the runs that are skipped.

    Raises:
        UsageError: a source is not a folder of runs, or there is no finished run.
    """
    require(len(sources) > 0, "no runs: name folders of runs or of studies")
    online = [source for source in map(str, sources) if source.startswith(WANDB)]
    require(not online, f"{''.join(online[:1])}: networks are not stored in W&B; name folders of runs")
    found = read_runs(map(str, sources), "losses/policy_loss")  # logged from the first update on
    unfinished = [f"{run.source}: not finished{LEFT_OUT}" for run in found.runs if not run.is_finished]
    for problem in found.problems + unfinished:
        print(f"*** {problem} ***")
    require(len(found.runs) > len(unfinished), "no finished runs: finish one, or name other folders")
    return [run for run in found.runs if run.is_finished]


def main(args: Args) -> None:
    """Measure all finished runs, print means over seeds, and write the table."""
    require(args.num_envs >= 3, f"--num-envs {args.num_envs}: must be at least 3, to fit, select and test a probe")
    require(args.num_steps > 0, f"--num-steps {args.num_steps}: must be at least 1")
    require(args.skip >= 0, f"--skip {args.skip}: must be 0 or more")
    require(args.seed >= 0, f"--seed {args.seed}: must be 0 or more")
    args = replace(args, output=check_output(args.output, "--output"))
    rows = {tuple(row.values())[:4]: tuple(row.values()) for row in check_table(args.output, COLUMNS, "--output")}
    records = finished_runs(args.runs)
    env_seed, draw = (int(seed) for seed in np.random.SeedSequence([args.seed, len(MEASURES)]).generate_state(2))
    measured = {}
    for number, (record, label) in enumerate(zip(records, labels(records), strict=True), 1):
        print(f"{number} of {len(records)}: {record.source}", flush=True)
        shape = {"num_envs": args.num_envs, "num_steps": args.num_steps, "num_minibatches": 1}
        try:
            run = read_run(record.source, **shape, seed=env_seed)
            require(run.progress["step"] == record.planned, f"its last model is from step {run.progress['step']}")
            found = measure(run, args.skip, jax.random.key(draw))
        except (UsageError, OSError) as error:
            said = str(error).removeprefix(f"{record.source}: ") if isinstance(error, UsageError) else error.strerror
            print(f"*** {record.source}: {said}{LEFT_OUT} ***")
            continue
        values = [found[name] for name in MEASURES]
        key = record.script, record.env_id, record.flags, str(record.seed)
        rows[key] = (*key, run.progress["step"], *("" if value is None else f"{value:.4g}" for value in values))
        measured.setdefault((record.env_id, label), []).append(values)
        write_csv(args.output, COLUMNS, rows.values())
    require(len(measured) > 0, "no run could be measured")
    table = [["", "", "seeds", *MEASURES]]
    for (env_id, label), of_seeds in measured.items():
        columns = [[value for value in column if value is not None] for column in zip(*of_seeds, strict=True)]
        table.append([env_id, label, str(len(of_seeds)), *(f"{np.mean(column):.3g}" if column else "-" for column in columns)])
    print(Table(table).markdown())
    print(f"written: {args.output}")


if __name__ == "__main__":
    run_main(lambda: main(parse_command(Args)), out_of_memory="out of memory: lower --num-envs or --num-steps")
