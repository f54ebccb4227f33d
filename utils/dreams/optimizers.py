"""The optimizers of DreamSPI: each moves the networks of one group, and leaves the others as they are, to the bit."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import optax
from jaxtyping import Int, Scalar

from utils.dreams.replay import prefill_iterations
from utils.runs.flags import Default, Needs, NotNegative, Positive

GROUPS = {"encoder": "model", "transition": "model", "reward": "model", "end": "model"}
GROUPS |= {"actor_critic": "heads", "critic": "heads", "discriminator": "discriminator", "slow_critic": "none"}


APART = Needs("--decoupled-layers, or no --fc-layers", lambda args: args.decoupled_layers or not args.fc_layers)


@dataclass
class DreamOptimizerArgs:
    """Flags of the optimizers."""

    learning_rate: Annotated[Positive, Default(minatar=2e-3)] = 2.5e-4
    """learning rate of AdamW for encoder and world model"""
    encoder_learning_rate: Positive | None = None
    """learning rate for the encoder, if it is to be another"""
    weight_decay: NotNegative = 0.01
    """weight decay of AdamW for encoder and world model"""
    heads_learning_rate: Annotated[Positive, Default(minatar=2e-3)] = 2.5e-4
    """learning rate of Adam for actor and critic"""
    critic_learning_rate: Annotated[Positive | None, APART] = None
    """learning rate for the critic, if it is to be another"""
    anneal_heads_lr: bool = True
    """lower the learning rates of actor and critic linearly to 0 over the run"""
    clip_apart: bool = False
    """clip the gradient of each network by itself to --max-grad-norm (of actor and critic, too), not that of encoder and world
    model, or of actor and critic, together"""


class Optimizers(NamedTuple):
    """Optimizers, their states, or their learning rates. Heads have two, so that the moments of what they learn from real data
    are not those of dreams."""

    model: Any
    heads: Any
    real_heads: Any
    discriminator: Any


def _labels(params: Any, label: Callable[[str], str]) -> Any:
    """A tree of labels: `label` of the name of each parameter's network, where the critic's part of the heads is one."""

    def of(name, path):
        return label("critic" if name == "actor_critic" and "critic" in jax.tree_util.keystr(path) else name)

    trees = params._asdict().items()
    return type(params)(*(jax.tree_util.tree_map_with_path(lambda path, _, name=name: of(name, path), x) for name, x in trees))


def make_optimizer(args: Any) -> Optimizers:
    """AdamW for encoder and world model, Adam for the others, each on its group's clipped gradient. Learning rates are applied
    in `descend`, but for what makes those of encoder and critic others."""
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
    """One step of the optimizer of that name: parameters and states after it."""
    updates, moved = getattr(optimizers, name).update(grads, getattr(opt_state, name), params)
    params = optax.apply_updates(params, jax.tree.map(lambda u: -getattr(rates, name) * u, updates))
    return params, opt_state._replace(**{name: moved})


def learning_rates(iteration: Int[Scalar, ""], args: Any) -> Optimizers:
    """Of each optimizer in this iteration."""
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
