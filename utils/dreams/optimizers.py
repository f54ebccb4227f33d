"""The optimizers of DreamSPI: each updates one group of networks and leaves the others unchanged."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import optax
from jaxtyping import Int, Scalar

from utils.dreams.replay import prefill_iterations
from utils.runs.flag_types import Default, Needs, NotNegative, Positive

GROUPS = {"encoder": "model", "transition": "model", "reward": "model", "end": "model"}
GROUPS |= {"actor_critic": "heads", "critic": "heads", "discriminator": "discriminator", "slow_critic": "none"}


APART = Needs("--decoupled-layers or an empty --fc-layers", lambda args: args.decoupled_layers or not args.fc_layers)


@dataclass
class DreamOptimizerArgs:
    """Flags of the optimizers."""

    learning_rate: Annotated[Positive, Default(minatar=2e-3)] = 2.5e-4
    """learning rate of AdamW, for encoder and world model"""
    encoder_learning_rate: Positive | None = None
    """learning rate of the encoder (default: --learning-rate)"""
    weight_decay: NotNegative = 0.01
    """weight decay of AdamW, for encoder and world model"""
    heads_learning_rate: Annotated[Positive, Default(minatar=2e-3)] = 2.5e-4
    """learning rate of Adam, for actor and critic"""
    critic_learning_rate: Annotated[Positive | None, APART] = None
    """learning rate of the critic (default: --heads-learning-rate)"""
    anneal_heads_lr: bool = True
    """anneal the learning rates of actor and critic linearly to 0 over the run"""
    clip_apart: bool = False
    """clip the gradient of each network to --max-grad-norm (actor and critic too), instead of two joint gradients: of encoder
    and world model, and of actor and critic"""


class Optimizers(NamedTuple):
    """Optimizers, their states, or their learning rates. The heads (actor and critic) have two: `heads` for dreams and
    `real_heads` for real data, so that the two have separate Adam moments."""

    model: Any
    heads: Any
    real_heads: Any
    discriminator: Any


def _labels(params: Any, label: Callable[[str], str]) -> Any:
    """Return a tree with `label(name)` for each parameter's network. The critic's part of `actor_critic` is named "critic"."""

    def of(name, path):
        return label("critic" if name == "actor_critic" and "critic" in jax.tree_util.keystr(path) else name)

    trees = params._asdict().items()
    return type(params)(*(jax.tree_util.tree_map_with_path(lambda path, _, name=name: of(name, path), x) for name, x in trees))


def make_optimizer(args: Any) -> Optimizers:
    """Return AdamW for encoder and world model, Adam for the others, each on its group's clipped gradient. `descend` applies
    each group's learning rate; here, encoder and critic are only scaled relative to it."""
    clip = optax.clip_by_global_norm(args.max_grad_norm)
    if args.clip_apart:
        clip = optax.partition(dict.fromkeys(GROUPS, clip), partial(_labels, label=str))
    scales = dict.fromkeys(GROUPS, optax.identity())
    scales["encoder"] = optax.scale((args.encoder_learning_rate or args.learning_rate) / args.learning_rate)
    scales["critic"] = optax.scale((args.critic_learning_rate or args.heads_learning_rate) / args.heads_learning_rate)
    scale = optax.partition(scales, partial(_labels, label=str))
    adam = optax.chain(clip, optax.scale_by_adam(eps=args.adam_eps))
    adamw = optax.chain(adam, optax.add_decayed_weights(args.weight_decay))
    frozen = dict.fromkeys(GROUPS.values(), optax.set_to_zero())

    def of(group, optimizer):
        return optax.partition(frozen | {group: optax.chain(optimizer, scale)}, partial(_labels, label=GROUPS.get))

    return Optimizers(of("model", adamw), of("heads", adam), of("heads", adam), of("discriminator", adam))


def descend(name: str, grads: Any, rates: Optimizers, params: Any, opt_state: Optimizers, optimizers: Optimizers) -> Any:
    """Take one step of the optimizer called `name`, and return the new parameters and optimizer states."""
    updates, moved = getattr(optimizers, name).update(grads, getattr(opt_state, name), params)
    params = optax.apply_updates(params, jax.tree.map(lambda u: -getattr(rates, name) * u, updates))
    return params, opt_state._replace(**{name: moved})


def learning_rates(iteration: Int[Scalar, ""], args: Any) -> Optimizers:
    """Return the learning rate of each optimizer in this iteration."""
    prefill = prefill_iterations(args)
    progress = (iteration - prefill) / (args.total_timesteps // (args.num_envs * args.num_steps) - prefill)
    if args.progressive == "none":
        real, dreams = 1.0 if args.dyna_style else 0.0, 1.0
    else:
        shares = {"linear": progress, "exponential": (1.0 - 0.01**progress) / 0.99, "late": 1e-8 ** (1.0 - progress)}
        dreams = shares[args.progressive]
        real = 1.0 - dreams
    left, left_of_heads = (1.0 - progress if anneal else 1.0 for anneal in (args.anneal_lr, args.anneal_heads_lr))
    heads = args.heads_learning_rate * left_of_heads
    return Optimizers(args.learning_rate * left, heads * dreams, heads * real, args.discriminator_learning_rate * left)
