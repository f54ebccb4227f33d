"""World models, one per file: transition (z, action) -> distribution of z', reward (z, action) -> [N].

To add a world model of categorical latents, write a file with `Transition(num_actions, activation, temperature)` and
`Reward(num_actions, activation)`, and add it to `CATEGORICAL`, from which `--world-model` takes its choices.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from networks.world_models import fc, lipschitz, softmoe, transformer, unconstrained

CATEGORICAL = {"fc": fc, "transformer": transformer, "softmoe": softmoe}


class Squashed(nn.Module):
    """A reward network with its output squashed to [-1, 1] by tanh, which is 1-Lipschitz."""

    reward: nn.Module

    @nn.compact
    def __call__(self, z, action):
        return jnp.tanh(self.reward(z, action))


def make_world_model(args: Any, num_actions: int) -> tuple[nn.Module, nn.Module]:
    """Create the networks that the flags describe: transition (z, action) -> distribution of z', reward (z, action) -> [N]."""
    density = args.transition_density, args.mixture_components, args.initial_scale
    if args.latent == "categorical":
        networks = CATEGORICAL[args.world_model]
        temperature = args.gumbel_temperature if args.use_gumbel_softmax else None
        transition = networks.Transition(num_actions, args.activation, temperature)
        reward = networks.Reward(num_actions, args.activation)
    else:
        networks, last = (lipschitz, args.lipschitz_constant) if args.lipschitz_nets else (unconstrained, args.activation)
        if args.transition_layers:
            transition = networks.DeepTransition(num_actions, *density, last, args.transition_layers)
        else:
            transition = networks.Transition(num_actions, *density, last)
        reward = networks.Reward(num_actions, last)
    return transition, Squashed(reward) if args.clip_reward_net_output else reward


def make_end_predictor(args: Any, num_actions: int) -> nn.Module:
    """Create the end predictor (z, action) -> [N], the logit of the probability that the step ends the episode. It is never
    certified, because the end of an episode is discontinuous."""
    if args.latent == "categorical":
        return CATEGORICAL[args.world_model].Reward(num_actions, args.activation)
    return unconstrained.Reward(num_actions, args.activation)
