"""Flags of the encoder, actor and critic (`NetworkArgs`), and of the world model (`WorldModelArgs`).

The choices of a flag come from the registries of the code: `ACTIVATIONS`, `DENSITIES`, `CATEGORICAL`, `CATEGORICAL_COSTS`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from envs.registry import observes_images, pays_beyond_one
from networks.architectures import ACTIVATIONS, IMAGE_ENCODERS
from networks.world_models import CATEGORICAL
from utils.distributions import DENSITIES, INITIAL_SCALE
from utils.runs.flag_types import BY_FAMILY, Count, Needs, NotNegative, Positive, Share, Sizes, as_typed, at_least
from utils.runs.flags import LAYERS, require
from utils.world_model import CATEGORICAL_COSTS

WITH_SCALE = tuple(name for name, density in DENSITIES.items() if density.has_scale)
SAMPLED = tuple(name for name, cost in CATEGORICAL_COSTS.items() if cost.samples)

CONTINUOUS = Needs("continuous latents", latent="continuous")
CODES = Needs(latent="categorical")
PENALIZED = Needs(lipschitz_nets=False)
SAMPLES = Needs(f"a sampled cost, --categorical-cost {' or '.join(SAMPLED)}", categorical_cost=SAMPLED)
SCALES = Needs("a density with scales", transition_density=WITH_SCALE)
IMAGES = Needs("image observations", lambda args: observes_images(args.env_id, args.env_option))
DensityFlag = Annotated[Literal[*DENSITIES], CONTINUOUS]


@dataclass
class NetworkArgs:
    """Flags of the encoder, actor and critic."""

    latent: Literal["continuous", "categorical"] = "continuous"
    """output of the encoder: its feature map, or one-hot categorical variables (straight-through argmax)"""
    num_categories: Annotated[Count, CODES] = 32
    """categorical latents: number of variables"""
    num_classes: Annotated[int, at_least(2), CODES] = 32
    """categorical latents: number of classes per variable"""
    encoder: Annotated[Literal[*IMAGE_ENCODERS], BY_FAMILY, IMAGES] = "nature"
    """network for image observations. nature: the three convolutions of the Nature DQN (Mnih et al., 2015). impala: IMPALA's
    residual network (Espeholt et al., 2018), deeper, with about 7 times the operations"""
    layer_norm_latent: bool = False
    """normalize the encoder's features to mean 0 and variance 1 (layer normalization, with a learned scale and shift)"""
    activation: Literal[*ACTIVATIONS] = "relu"
    """activation of the encoder, actor and critic"""
    fc_layers: Annotated[Sizes, BY_FAMILY] = (512,)
    """sizes of the dense layers between the latent and the heads (actor and critic)"""
    use_layer_norm: Annotated[bool, LAYERS] = False
    """layer normalization in the dense layers of --fc-layers, before the activation"""
    decoupled_layers: Annotated[bool, LAYERS, Needs("a shared encoder, without --decoupled-repr", decoupled_repr=False)] = False
    """separate dense layers for actor and critic, with a shared encoder"""
    decoupled_repr: Annotated[bool, BY_FAMILY] = False
    """separate encoder and dense layers for the critic: actor and critic share nothing"""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """data type in which encoder, actor and critic multiply, except their output layers; all else is float32"""


@dataclass
class WorldModelArgs:
    """Flags of the world model."""

    # continuous latents
    transition_density: DensityFlag = "mixture_normal"
    """continuous latents: distribution of the next latent; mixture_normal is a weighted average of normals (a soft mixture)"""
    mixture_components: Annotated[Count, CONTINUOUS, Needs(transition_density="mixture_normal")] = 5
    """number of components of mixture_normal"""
    initial_scale: Annotated[Positive, CONTINUOUS, SCALES] = INITIAL_SCALE
    """initial scale of each component (times K / 10 in Lipschitz networks)"""
    lipschitz_nets: Annotated[bool, CONTINUOUS] = True
    """continuous latents: transition and reward networks that are K-Lipschitz for every parameter value; without it, they are
    unconstrained, with a gradient penalty if --lambda-gp is positive"""
    lipschitz_constant: Annotated[Positive, CONTINUOUS, Needs(lipschitz_nets=True)] = 1.0
    """K of the Lipschitz networks"""
    lambda_gp: Annotated[NotNegative, CONTINUOUS, PENALIZED] = 0.01
    """weight of the gradient penalty on unconstrained networks; 0 disables it"""
    use_wgan_gp: Annotated[bool, CONTINUOUS, PENALIZED] = False
    """penalty of (gradient norm - 1)^2 instead of the squared norm; pulls slopes toward 1 instead of 0"""
    transition_layers: Annotated[Sizes, CONTINUOUS] = ()
    """layer widths of a deeper, residual transition network (even numbers for Lipschitz networks); empty: the paper's two-layer
    network"""
    # categorical latents
    world_model: Annotated[Literal[*CATEGORICAL], CODES] = "fc"
    """categorical latents: type of transition network"""
    categorical_cost: Annotated[Literal[*CATEGORICAL_COSTS], CODES] = "l2"
    """categorical latents: distance of the next latent to a sample (l2, hamming) or to the predicted probabilities (others)"""
    use_gumbel_softmax: Annotated[bool, CODES, SAMPLES] = False
    """categorical latents: one-hot samples have the gradient of the Gumbel-softmax, not of the probabilities"""
    gumbel_temperature: Annotated[Positive, CODES, SAMPLES, Needs(use_gumbel_softmax=True)] = 1.0
    """temperature of the Gumbel-softmax"""
    # both
    w_balancing: Share | None = None
    """fraction of the transition loss's gradient that reaches the prediction; the rest reaches the next latent (like
    DreamerV2's KL balancing). By default both get the full gradient"""
    encoder_gradient: Share = 1.0
    """factor of the world-model losses' gradient in the encoder; 0: the encoder learns from the other losses alone"""
    clip_reward_net_output: bool = False
    """squash the reward network's output to [-1, 1]"""

    def check(self) -> None:
        """Raise UsageError if these flags contradict each other or the script's flags."""
        require(
            self.lambda_gp > 0 or not self.use_wgan_gp,
            f"--lambda-gp {self.lambda_gp}: --use-wgan-gp needs a positive penalty weight; increase it or drop --use-wgan-gp",
        )
        even = not self.lipschitz_nets or not any(size % 2 for size in self.transition_layers)
        require(even, f"{as_typed('transition_layers', self.transition_layers)}: Lipschitz networks need even widths")
        require(
            not self.clip_reward_net_output or self.reward_clip,
            "--clip-reward-net-output: cannot predict unclipped rewards; drop it or --no-reward-clip",
        )
        require(
            not (self.clip_reward_net_output and pays_beyond_one(self.env_id, self.env_option)),
            f"--clip-reward-net-output: cannot predict the rewards of {self.env_id} beyond [-1, 1]; drop it",
        )
