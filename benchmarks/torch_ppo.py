# /// script
# requires-python = ">=3.12"
# dependencies = ["torch==2.15.0", "numpy"]
# [tool.uv]
# exclude-newer = "2026-11-16T00:00:00Z"
# ///
"""Measure how fast PyTorch computes PPO's networks and updates on Atari, without an environment, in its own installation.

    uv run --script benchmarks/torch_ppo.py [num_envs [num_steps [num_actions [rounds]]]]

`benchmarks/throughput.py --torch` runs this script and prints its rows next to ours. The network is that of our scripts,
CleanRL and Mnih et al. (2015). A rollout is one forward pass per step for all environments, on random frames. An update is four
epochs of four minibatches of PPO's loss with Adam. The rows are PyTorch's usual layout, its hand-tuned layout (channels last),
and channels last in bfloat16 (autocast, heads included). The benchmark uses a GPU if PyTorch finds one.
"""

import argparse
import json
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

EPOCHS, MINIBATCHES, EPS = 4, 4, 0.1


class ActorCritic(nn.Module):
    """Three convolutions, a dense layer, two heads."""

    def __init__(self, num_actions: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(),
        )  # fmt: skip
        self.actor, self.critic = nn.Linear(512, num_actions), nn.Linear(512, 1)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [N, A] and values [N] for frames [N, 4, 84, 84]."""
        hidden = self.body(obs)
        return self.actor(hidden), self.critic(hidden)[:, 0]


def measure(num_envs: int, num_steps: int, num_actions: int, rounds: int, channels_last: bool, bfloat16: bool) -> dict:
    """Return a row with the median speed of one layout and data type."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = ActorCritic(num_actions).to(device).to(memory_format=layout)
    optimizer = torch.optim.Adam(net.parameters(), 2.5e-4, eps=1e-5)
    total = num_envs * num_steps
    frames = torch.randint(0, 256, (num_steps, num_envs, 4, 84, 84), dtype=torch.uint8, device=device)
    advantage, target = torch.randn(total, device=device), torch.randn(total, device=device)

    def prepared(frames):
        return (frames.float() / 255.0).to(memory_format=layout)

    def outputs(frames):
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits, value = net(prepared(frames))
        return logits.float(), value.float()

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def rollout():
        actions, log_probs = [], []
        with torch.no_grad():
            for obs in frames:
                policy = torch.distributions.Categorical(logits=outputs(obs)[0])
                action = policy.sample()
                actions.append(action), log_probs.append(policy.log_prob(action))
        return torch.cat(actions), torch.cat(log_probs)

    def update(action, old):
        obs = frames.flatten(0, 1)
        for _ in range(EPOCHS):
            for rows in torch.randperm(total, device=device).chunk(MINIBATCHES):
                logits, value = outputs(obs[rows])
                policy = torch.distributions.Categorical(logits=logits)
                ratio = (policy.log_prob(action[rows]) - old[rows]).exp()
                a = advantage[rows]
                a = (a - a.mean()) / (a.std() + 1e-8)
                loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - EPS, 1 + EPS)).mean()
                loss = loss + 0.25 * F.mse_loss(value, target[rows]) - 0.01 * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()

    rolling, learning = [], []
    for _ in range(rounds + 1):
        start = wait()
        done = rollout()
        middle = wait()
        update(*done)
        rolling.append(middle - start), learning.append(wait() - middle)
    rolling, learning = (statistics.median(x[1:]) for x in (rolling, learning))
    form = ("channels last" if channels_last else "usual layout") + (", bfloat16" if bfloat16 else "")
    return {
        "setting": f"PyTorch {torch.__version__}, {form}, no environment",
        "steps_per_second": total / (rolling + learning),
        "rollout_seconds": rolling,
        "update_seconds": learning,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("num_envs", 128), ("num_steps", 8), ("num_actions", 4), ("rounds", 5)):
        parser.add_argument(name, nargs="?", type=int, default=default)
    flags = vars(parser.parse_args())
    rows = ({"channels_last": last, "bfloat16": low} for last, low in ((False, False), (True, False), (True, True)))
    print(json.dumps([measure(**flags, **row) for row in rows]))
