"""Encoder, actor and critic, shared by PPO and the world-model methods.

A continuous latent is a feature map [N, h, w, c]: 7 x 7 x 64 for Atari frames, 1 x 1 x 128 for grids of cells, 1 x 1 x 64 for
short vectors. A categorical latent has V variables with C classes each, [N, V, C], one-hot in the last axis.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from envs.observations import Part, channels_first, is_grid, is_image, unpack, unreadable
from networks.convolution import conv2d, frames_conv2d, grid_layer, halve
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
    """A convolution with square kernels and orthogonal initialization. Inputs are maps with channels last, or, with
    `of_frames`, frames of bytes with channels first."""

    features: int
    size: int
    stride: int
    dtype: jnp.dtype
    of_frames: bool = False
    padding: str = "VALID"

    @nn.compact
    def __call__(self, x: Num[Array, "N _ _ _"]) -> Float[Array, "N h w O"]:
        shape = (self.size, self.size, x.shape[1 if self.of_frames else -1], self.features)
        kernel = self.param("kernel", nn.initializers.orthogonal(np.sqrt(2)), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if self.of_frames:
            y = frames_conv2d(x, kernel, self.stride, self.padding)
        else:
            y = conv2d(x.astype(self.dtype), kernel, self.stride, self.padding)
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


class Impala(nn.Module):
    """IMPALA's residual network (Espeholt et al., 2018, figure 3, without the recurrent layer): three stages of a convolution,
    max pooling, and two residual blocks. The feature map has an eighth of the pixels along each axis."""

    activation: Callable
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Num[Array, "N _ _ _"], of_frames: bool) -> Float[Array, "N h w c"]:
        for stage, features in enumerate((16, 32, 32)):
            layer = partial(Conv, features, 3, 1, self.dtype, padding="SAME")
            x = halve(layer(of_frames=of_frames and stage == 0)(x))
            for _ in range(2):
                x = x + layer()(self.activation(layer()(self.activation(x))))
        return self.activation(x)


SMALLEST_INPUT = 36  # pixels along each axis for the Nature DQN's convolutions; smaller images are padded with zeros
IMAGE_ENCODERS = ("nature", "impala")


class Encoder(nn.Module):
    """phi: observation -> latent. What an observation is selects the layers:

    - images of at least 32 pixels along each axis, bytes or floats, channels first or last: the convolutions of the Nature DQN
      (Mnih et al., 2015), or `Impala`;
    - smaller maps, channels last: one convolution and a dense layer, as is usual on MinAtar (Young & Tian, 2019);
    - vectors: one dense layer, of 64 units, or 256 for more than 256 numbers;
    - several parts, symbols or text (`parts`, see `envs.observations`): the above for each part, then one dense layer for all.
      Symbols become one-hot codes; maps of symbols one plane per symbol and channel.

    For a categorical latent, a dense layer of logits follows. Each variable takes its likeliest class, with the gradient of the
    softmax (straight-through; Bengio et al., 2013, in the form of Hafner et al., 2021, without their sampling). This layer
    computes in float32, all others multiply in `dtype`. With `layer_norm`, the features are normalized before that.

    Raises:
        ValueError: observations have three axes and are neither images nor a grid.
    """

    activation: str = "relu"
    latent: str = "continuous"
    num_categories: int = 32
    num_classes: int = 32
    dtype: jnp.dtype = FLOAT32
    images: str = "nature"
    layer_norm: bool = False
    parts: tuple[Part, ...] | None = None

    @nn.compact
    def __call__(self, obs: Num[Array, "N *obs"]) -> Float[Array, "N *z"]:
        if self.parts is not None:
            flat = [self.read_part(part, x) for part, x in zip(self.parts, unpack(obs, self.parts), strict=True)]
            x = self.dense(jnp.concatenate(flat, axis=1), any(len(part.shape) == 3 for part in self.parts))
        elif is_image(obs.shape[1:]):
            x = self.read_image(obs)
        elif obs.ndim == 4:
            x = self.dense(self.read_map(obs), is_map=True)
        else:
            x = self.dense(obs.reshape(obs.shape[0], -1), is_map=False)
        if self.layer_norm:
            x = nn.LayerNorm(reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3), name="latent_norm")(x)
        if self.latent == "continuous":
            return x
        logits = Dense(self.num_categories * self.num_classes, 1.0, name="code")(x.reshape(x.shape[0], -1))
        logits = logits.reshape(-1, self.num_categories, self.num_classes)
        hard = nn.one_hot(jnp.argmax(logits, axis=-1), self.num_classes)
        return straight_through(hard, nn.softmax(logits))

    def read_image(self, x: Num[Array, "N _ _ _"]) -> Float[Array, "N h w c"]:
        """Return the feature map of an image: bytes, or floats from 0 to 1."""
        is_first, of_bytes = channels_first(x.shape[1:]), jnp.issubdtype(x.dtype, jnp.integer)
        if of_bytes and not is_first:
            x = x.transpose(0, 3, 1, 2)
        elif not of_bytes and is_first:
            x = x.transpose(0, 2, 3, 1)
        activation = ACTIVATIONS[self.activation]
        if self.images == "impala":
            return Impala(activation, self.dtype)(x, of_bytes)
        axes = (2, 3) if of_bytes else (1, 2)
        x = jnp.pad(x, [(0, max(0, SMALLEST_INPUT - n) * (axis in axes)) for axis, n in enumerate(x.shape)])
        x = activation(Conv(32, 8, 4, self.dtype, of_frames=of_bytes)(x))
        x = activation(Conv(64, 4, 2, self.dtype)(x))
        return activation(Conv(64, 3, 1, self.dtype)(x))

    def read_map(self, x: Num[Array, "N H W C"]) -> Float[Array, "N d"]:
        """Return the features of a small map."""
        if said := unreadable(x.shape[1:]):
            raise ValueError(said)
        return GridLayer(16, 3, ACTIVATIONS[self.activation], self.dtype)(x).reshape(x.shape[0], -1)

    def read_part(self, part: Part, x: Num[Array, "N *shape"]) -> Float[Array, "N d"]:
        """Return the features of one part of an observation."""
        if part.kind == "text":
            return Text(32, 64, ACTIVATIONS[self.activation], self.dtype)(x)
        if part.kind == "pixels":
            return self.read_image(x.astype(jnp.uint8)).reshape(x.shape[0], -1)
        if part.kind == "counts":
            x = (x - part.lowest) / (part.values[0] - 1)
        if part.kind == "symbols":
            channels = jnp.moveaxis(x.astype(jnp.int32) - part.lowest, -1, 0)
            codes = [nn.one_hot(channel, n) for channel, n in zip(channels, part.values, strict=True)]
            x = jnp.concatenate(codes, axis=-1)
        if is_grid(x.shape[1:]):
            return self.read_map(x)
        return x.reshape(x.shape[0], -1).astype(FLOAT32)

    def dense(self, x: Num[Array, "N d"], is_map: bool) -> Float[Array, "N 1 1 c"]:
        """Return the latent of flat features."""
        units = 128 if is_map else 64 if x.shape[1] <= 256 else 256
        return ACTIVATIONS[self.activation](Dense(units, dtype=self.dtype)(x))[:, None, None, :]


class Text(nn.Module):
    """A text of bytes, padded with zeros: a convolution over windows of eight characters, then a dense layer. A character is
    read as its eight bits."""

    channels: int
    features: int
    activation: Callable
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, text: Num[Array, "N L"]) -> Float[Array, "N features"]:
        bits = (text.astype(jnp.int32)[..., None] >> jnp.arange(8)) & 1
        bits = jnp.pad(bits, ((0, 0), (0, -text.shape[1] % 4), (0, 0))).reshape(text.shape[0], -1, 32).astype(FLOAT32)
        windows = jnp.concatenate([bits[:, :-1], bits[:, 1:]], axis=-1)
        words = self.activation(Dense(self.channels, dtype=self.dtype)(windows))
        return self.activation(Dense(self.features, dtype=self.dtype)(words.reshape(text.shape[0], -1)))


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


def make_encoder(args: Any, obs_parts: tuple[Part, ...] | None = None) -> Encoder:
    """Create the encoder that the flags describe, for observations of these parts (`envs.observations`; None: one array)."""
    sizes = args.num_categories, args.num_classes, jnp.dtype(args.compute_dtype)
    return Encoder(args.activation, args.latent, *sizes, args.encoder, args.layer_norm_latent, obs_parts)


def to_range(z: Float[Array, "N *z"], args: Any) -> Float[Array, "N *z"]:
    """Clip z to the range of the encoder's activation. This map is 1-Lipschitz and never increases the distance to a latent.
    Categorical and normalized latents stay as they are."""
    return z if args.latent == "categorical" or args.layer_norm_latent else jnp.clip(z, *RANGES[args.activation])


def make_actor_critic(args: Any, num_actions: int, obs_parts: tuple[Part, ...] | None = None) -> ActorCritic:
    """Create the heads that the flags describe, with the critic's own encoder if requested."""
    own_encoder = make_encoder(args, obs_parts) if args.decoupled_repr else None
    layers = args.fc_layers, args.activation, args.use_layer_norm
    return ActorCritic(num_actions, *layers, args.decoupled_layers, own_encoder, jnp.dtype(args.compute_dtype))
