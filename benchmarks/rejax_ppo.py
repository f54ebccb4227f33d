# /// script
# requires-python = ">=3.12"
# dependencies = ["rejax==0.1.3", "gymnax==0.0.9", "jax<0.12", "six", "setuptools"]
# [tool.uv]
# exclude-newer = "2026-11-16T00:00:00Z"
# ///
"""Measure how fast another public JAX PPO trains on MinAtar: rejax 0.1.3 on gymnax's games, in its own Python environment.

    uv run --script benchmarks/rejax_ppo.py [env_id [rounds]]

`benchmarks/throughput.py --rejax` runs this script and prints its rows next to ours. Rollouts and updates have the same shapes
as ours. rejax's own networks have no convolutions: they are two perceptrons, here with 128 units, on the 400 flattened cells.
The second row uses our network instead (a 3 x 3 convolution with 16 channels, dense 128), one for the actor and one for the
critic, because rejax's actor and critic share nothing.
"""

import argparse
import json
import os
import statistics
import time

os.environ["MPLBACKEND"] = "agg"  # gymnax imports Matplotlib, and a notebook's own backend may be missing here

import jax
import rejax
from flax import linen as nn
from rejax.networks import DiscretePolicy

CONFIG = {
    "num_envs": 64, "num_steps": 128, "num_epochs": 4, "num_minibatches": 8, "learning_rate": 1e-3, "gamma": 0.99,
    "clip_eps": 0.1, "max_grad_norm": 0.5,
}  # fmt: skip


class Features(nn.Module):
    """Our network without the heads."""

    @nn.compact
    def __call__(self, obs):
        x = nn.relu(nn.Conv(16, (3, 3), padding="VALID")(obs.astype(float)))
        return nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))


class Actor(DiscretePolicy):
    """rejax's policy on our network."""

    def setup(self):
        self.features = Features()
        self.action_logits = nn.Dense(self.action_dim)


class Critic(nn.Module):
    """A value head on our network."""

    @nn.compact
    def __call__(self, obs):
        return nn.Dense(1)(Features()(obs)).squeeze(1)


def measure(convolutional: bool, env_id: str, rounds: int) -> dict:
    """Return a row with the median steps per second, rollouts and updates included."""
    agent_kwargs = {"hidden_layer_sizes": (128,), "activation": "relu"}
    algorithm = rejax.PPO.create(
        env=env_id, agent_kwargs=agent_kwargs, total_timesteps=10**6, eval_freq=10**6, skip_initial_evaluation=True, **CONFIG
    )
    if convolutional:
        algorithm = algorithm.replace(actor=Actor(algorithm.action_dim, (), nn.relu), critic=Critic())
    state = algorithm.init_state(jax.random.key(0))
    iteration = jax.jit(algorithm.train_iteration, donate_argnums=0)
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        state = jax.block_until_ready(iteration(state))
        seconds.append(time.perf_counter() - start)
    compiled, *seconds = seconds
    rate = CONFIG["num_envs"] * CONFIG["num_steps"] / statistics.median(seconds)
    networks = "our network, twice" if convolutional else "its perceptrons"
    return {"setting": f"rejax's PPO {env_id}, {networks}", "steps_per_second": rate, "compile_seconds": compiled}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env_id", nargs="?", default="Breakout-MinAtar")
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    args = parser.parse_args()
    print(json.dumps([measure(convolutional, args.env_id, args.rounds) for convolutional in (False, True)]))
