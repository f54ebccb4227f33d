"""The end predictor, which decides when a dream ends."""

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from envs.protocol import Env
from utils.losses import smooth_l1_loss
from utils.runs.flag_types import NotNegative
from utils.runs.flags import require


@dataclass
class EndArgs:
    """Flags of the end predictor."""

    end_loss_coef: NotNegative = 1.0
    """weight of the end predictor's loss"""
    end_loss: Literal["cross_entropy", "huber"] = "cross_entropy"
    """cross_entropy: predict from latent and action; the gradient stops at the latent. huber: Huber's loss of the probability
    predicted from the next latent; it is added to the reward loss in the utility, and also trains the encoder"""

    def check(self) -> None:
        """Raise UsageError if the flags contradict each other."""
        said = "--end-loss huber: is part of the reward loss; set --reward-loss-coef above 0"
        require(self.end_loss == "cross_entropy" or self.reward_loss_coef > 0, said)


def check_ends(env: Env, args: Any) -> None:
    """Raise UsageError if the end predictor would learn from terminal observations that the environment does not return."""
    said = "--end-loss huber: learns from terminal observations, which this environment does not return; use cross_entropy"
    require(args.end_loss == "cross_entropy" or not env.resets_within, said)


def end_logit(
    params: Any, z: Float[Array, "N *z"], action: Int[Array, " N"], next_z: Float[Array, "N *z"], agent: Any, args: Any
) -> Float[Array, " N"]:
    """Return the logit of the probability that the step from z to `next_z` ends the episode."""
    # the next latent makes the action redundant
    of = (z, action) if args.end_loss == "cross_entropy" else (next_z, jnp.zeros_like(action))
    return agent.end.apply(params.end, *of)


def end_losses(logit: Float[Array, " N"], ended: Bool[Array, " N"], args: Any) -> Float[Array, " N"]:
    """Return the end predictor's loss of each step."""
    if args.end_loss == "cross_entropy":
        return optax.sigmoid_binary_cross_entropy(logit, ended.astype(jnp.float32))
    return smooth_l1_loss(nn.sigmoid(logit) - ended)
