"""Encoder, actor and critic, shared by PPO and the world-model methods.

A continuous latent is a feature map [N, h, w, c]: 7 x 7 x 64 for Atari frames, 1 x 1 x 128 for grids of cells, 1 x 1 x 64 for
vector observations. A categorical latent has V variables with C classes each, [N, V, C], one-hot in the last axis.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from envs.frames import SMALLEST_FRAME
from networks.convolution import conv2d, frames_conv2d, grid_layer
from networks.products import product
from utils.distributions import straight_through

ACTIVATIONS: dict[str, Callable] = {
    "relu": nn.relu,
    "elu": nn.elu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "tanh": nn.tanh,
}
RANGES = {  # output range of each activation, lower bounds rounded down
    "relu": (0.0, np.inf), "elu": (-1.0, np.inf), "gelu": (-0.1701, np.inf), "silu": (-0.2785, np.inf), "tanh": (-1.0, 1.0)
}  # fmt: skip
FLOAT32 = jnp.dtype("float32")
STEEPEST = {"relu": 1.0, "elu": 1.0, "gelu": 1.13, "silu": 1.1, "tanh": 1.0}  # Lipschitz constants, rounded up


# Layers with a `dtype` multiply in it but add the bias in float32. The bias gradient is a sum over samples and pixels, and
# in bfloat16 such a sum stops growing after a few hundred terms.
class Conv(nn.Module):
    """A VALID convolution with square kernels and orthogonal initialization. Inputs are maps with channels last, or,
    with `of_frames`, frames with channels first."""

    features: int
    size: int
    stride: int
    dtype: jnp.dtype
    of_frames: bool = False

    @nn.compact
    def __call__(self, x: Num[Array, "N _ _ _"]) -> Float[Array, "N h w O"]:
        shape = (self.size, self.size, x.shape[1 if self.of_frames else -1], self.features)
        kernel = self.param("kernel", nn.initializers.orthogonal(np.sqrt(2)), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = frames_conv2d(x, kernel, self.stride) if self.of_frames else conv2d(x.astype(self.dtype), kernel, self.stride)
        return y.astype(FLOAT32) + bias


class GridLayer(nn.Module):
    """A VALID convolution of a small map with its activation, initialized like `Conv`."""

    features: int
    size: int
    activation: Callable
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Num[Array, "N H W C"]) -> Float[Array, "N h w O"]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.orthogonal(np.sqrt(2)), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return grid_layer(x.astype(self.dtype), kernel, bias, self.activation)


class Dense(nn.Module):
    """A dense layer with orthogonal initialization and the given gain."""

    features: int
    gain: float = 2**0.5
    dtype: jnp.dtype = FLOAT32

    @nn.compact
    def __call__(self, x: Num[Array, "*batch d"]) -> Float[Array, "*batch k"]:
        kernel = self.param("kernel", nn.initializers.orthogonal(self.gain), (x.shape[-1], self.features)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return product(x.astype(self.dtype), kernel).astype(FLOAT32) + bias


class Encoder(nn.Module):
    """phi: observation -> latent. The shape of an observation selects the layers:
    - frames, channels first, at least 36 pixels along each axis: the convolutions of the Nature DQN;
    - smaller grids of cells, channels last: one convolution and a dense layer, as is usual on MinAtar (Young & Tian, 2019);
    - vectors: one dense layer.

    For a categorical latent, a dense layer of logits follows. Each variable takes its likeliest class, with the gradient of the
    softmax (straight-through; Bengio et al., 2013, in the form of Hafner et al., 2021, without their sampling). This layer
    computes in float32, all others multiply in `dtype`.

    Raises:
        ValueError: observations have three axes and are neither frames nor a grid.
    """

    activation: str = "relu"
    latent: str = "continuous"
    num_categories: int = 32
    num_classes: int = 32
    dtype: jnp.dtype = FLOAT32

    @nn.compact
    def __call__(self, obs: Num[Array, "N *obs"]) -> Float[Array, "N *z"]:
        activation = ACTIVATIONS[self.activation]
        if obs.ndim == 4 and min(obs.shape[2:]) >= SMALLEST_FRAME:  # stacked gray frames, as emulators return them
            x = activation(Conv(32, 8, 4, self.dtype, of_frames=True)(obs))
            x = activation(Conv(64, 4, 2, self.dtype)(x))
            x = activation(Conv(64, 3, 1, self.dtype)(x))
        elif obs.ndim == 4:  # a grid of cells
            if min(obs.shape[1:3]) < 3 or max(obs.shape[1:3]) >= SMALLEST_FRAME:
                raise ValueError(
                    f"observations of shape {obs.shape[1:]}: must be frames, [channels, height, width], of {SMALLEST_FRAME} or "
                    f"more pixels along each axis, or a grid, [height, width, channels], of 3 to {SMALLEST_FRAME - 1} cells"
                )
            x = GridLayer(16, 3, activation, self.dtype)(obs)
            x = activation(Dense(128, dtype=self.dtype)(x.reshape(x.shape[0], -1)))[:, None, None, :]
        else:
            x = activation(Dense(64, dtype=self.dtype)(obs.reshape(obs.shape[0], -1)))[:, None, None, :]
        if self.latent == "continuous":
            return x
        logits = Dense(self.num_categories * self.num_classes, 1.0, name="code")(x.reshape(x.shape[0], -1))
        logits = logits.reshape(-1, self.num_categories, self.num_classes)
        hard = nn.one_hot(jnp.argmax(logits, axis=-1), self.num_classes)
        return straight_through(hard, nn.softmax(logits))


class Hidden(nn.Module):
    """The dense layers between latent and heads."""

    layers: Sequence[int]
    activation: str
    layer_norm: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "N d"]) -> Float[Array, "N k"]:
        for features in self.layers:
            x = Dense(features, dtype=self.dtype)(x)
            if self.layer_norm:
                x = nn.LayerNorm()(x)
            x = ACTIVATIONS[self.activation](x)
        return x


class ActorCritic(nn.Module):
    """The latent policy pi(a|z), as logits, and the value V(z).

    Actor and critic share their dense layers. With `own_layers` each has its own, and they share only the latent. With
    `own_encoder` the critic also has its own encoder, which reads the observation. The dense layers multiply in `dtype`, the
    output layers in float32.
    """

    num_actions: int
    layers: Sequence[int] = (512,)
    activation: str = "relu"
    layer_norm: bool = False
    own_layers: bool = False
    own_encoder: Encoder | None = None
    dtype: jnp.dtype = FLOAT32

    @nn.compact
    def __call__(
        self, z: Float[Array, "N *z"], obs: Num[Array, "N *obs"] | None = None
    ) -> tuple[Float[Array, "N A"], Float[Array, " N"]]:
        """Return logits and values. Only the critic's own encoder reads the observations."""
        flat = lambda x: x.reshape(x.shape[0], -1)  # noqa: E731
        kind = self.layers, self.activation, self.layer_norm, self.dtype
        hidden = critic_hidden = Hidden(*kind, name="hidden")(flat(z))
        if self.own_layers or self.own_encoder is not None:
            critic_z = z if self.own_encoder is None else self.own_encoder(obs)
            critic_hidden = Hidden(*kind, name="critic_hidden")(flat(critic_z))
        logits = Dense(self.num_actions, 0.01, name="actor")(hidden)
        value = Dense(1, 1.0, name="critic")(critic_hidden)
        return logits, jnp.squeeze(value, -1)

    def policy_lipschitz(self, params: Any) -> Float[Array, ""]:
        """Return a Lipschitz constant of z -> pi(.|z), from the Euclidean norm to total variation (half the sum of absolute
        differences).

        For the difference of two logits, it is the product of the dense layers' spectral norms, the activations' Lipschitz
        constants, and the largest norm of a difference of two actor columns. The softmax contributes 1/4: for probabilities p
        and logit changes v, total variation is half the sum of p_i |v_i - p.v|, and that sum is at most half of v's range.
        Layer normalization has no finite constant: the result is inf. Rounding errors are ignored, for every dtype.
        """
        if self.layer_norm and self.layers:
            return jnp.asarray(jnp.inf)
        layers = params["params"]
        steepness = STEEPEST[self.activation] ** len(self.layers)
        for i in range(len(self.layers)):
            kernel = layers["hidden"][f"Dense_{i}"]["kernel"]
            kernel = kernel if kernel.shape[0] >= kernel.shape[1] else kernel.T
            gram = jnp.matmul(kernel.T, kernel, precision="highest")
            steepness = steepness * jnp.sqrt(jnp.linalg.eigvalsh(gram)[-1])
        actor = layers["actor"]["kernel"]
        between = jnp.linalg.norm(actor[:, :, None] - actor[:, None], axis=0)
        return 0.25 * jnp.max(between) * steepness


def make_encoder(args: Any) -> Encoder:
    """Create the encoder that the flags describe."""
    return Encoder(args.activation, args.latent, args.num_categories, args.num_classes, jnp.dtype(args.compute_dtype))


def to_range(z: Float[Array, "N *z"], args: Any) -> Float[Array, "N *z"]:
    """Clip z to the range of the encoder's activation. This map is 1-Lipschitz and never increases the distance to a latent.
    Categorical latents stay as they are."""
    return jnp.clip(z, *RANGES[args.activation]) if args.latent == "continuous" else z


def make_actor_critic(args: Any, num_actions: int) -> ActorCritic:
    """Create the heads that the flags describe, with the critic's own encoder if requested."""
    own_encoder = make_encoder(args) if args.decoupled_repr else None
    layers = args.fc_layers, args.activation, args.use_layer_norm
    return ActorCritic(num_actions, *layers, args.decoupled_layers, own_encoder, jnp.dtype(args.compute_dtype))
