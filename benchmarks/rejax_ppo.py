# /// script
# requires-python = ">=3.12"
# dependencies = ["rejax==0.1.3", "gymnax==0.0.9", "jax<0.12", "six", "setuptools"]
# [tool.uv]
# exclude-newer = "2026-11-16T00:00:00Z"
# ///
"""How fast another public JAX PPO trains on MinAtar: rejax 0.1.3 on gymnax's games, in an environment of its own.

    uv run --script benchmarks/rejax_ppo.py [env_id [rounds]]

`benchmarks/throughput.py --rejax` starts it, and prints its rows beside ours. Rollouts and updates are shaped like
ours. rejax's own networks have no convolutions: two perceptrons, here of 128 units, on the 400 flattened cells.
A second row has our network instead (a 3 x 3 convolution of 16 channels, dense 128), one for the actor and one for the critic,
which share nothing in rejax.
"""

import argparse
import json
import statistics
import time

import jax
import rejax
from flax import linen as nn
from rejax.networks import DiscretePolicy

CONFIG = {
    "num_envs": 64, "num_steps": 128, "num_epochs": 4, "num_minibatches": 8, "learning_rate": 1e-3, "gamma": 0.99,
    "clip_eps": 0.1, "max_grad_norm": 0.5,
}  # fmt: skip


class Features(nn.Module):
    """Our network up to the heads."""

    @nn.compact
    def __call__(self, obs):
        x = nn.relu(nn.Conv(16, (3, 3), padding="VALID")(obs.astype(float)))
        return nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))


class Actor(DiscretePolicy):
    """rejax's policy on it."""

    def setup(self):
        self.features = Features()
        self.action_logits = nn.Dense(self.action_dim)


class Critic(nn.Module):
    """A value on it."""

    @nn.compact
    def __call__(self, obs):
        return nn.Dense(1)(Features()(obs)).squeeze(1)


def measure(convolutional: bool, env_id: str, rounds: int) -> dict:
    """The median rate of updates, rollouts included."""
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
