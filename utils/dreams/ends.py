"""The predictor of ends: when a dream is over."""

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from utils.losses import smooth_l1_loss
from utils.runs.flags import NotNegative, require


@dataclass
class EndArgs:
    """Flags of the predictor of ends."""

    end_loss_coef: NotNegative = 1.0
    """weight of the loss of the predictor of ends"""
    end_loss: Literal["cross_entropy", "huber"] = "cross_entropy"
    """cross_entropy of the end, given latent and action; its gradient stops at the latent. Or Huber's loss of its probability,
    given the next latent, and beside the reward loss in the utility, whence its gradient reaches the encoder"""

    def check(self) -> None:
        """Raises UsageError where the flags do not go together."""
        said = "--end-loss huber: stands within the reward loss, and needs a --reward-loss-coef above 0"
        require(self.end_loss == "cross_entropy" or self.reward_loss_coef > 0, said)


def end_logit(
    params: Any, z: Float[Array, "N *z"], action: Int[Array, " N"], next_z: Float[Array, "N *z"], agent: Any, args: Any
) -> Float[Array, " N"]:
    """Of the probability that the step from z to `next_z` ends the episode."""
    # given the next latent, the action says nothing more
    of = (z, action) if args.end_loss == "cross_entropy" else (next_z, jnp.zeros_like(action))
    return agent.end.apply(params.end, *of)


def end_losses(logit: Float[Array, " N"], ended: Bool[Array, " N"], args: Any) -> Float[Array, " N"]:
    """The loss of each step."""
    if args.end_loss == "cross_entropy":
        return optax.sigmoid_binary_cross_entropy(logit, ended.astype(jnp.float32))
    return smooth_l1_loss(nn.sigmoid(logit) - ended)
