"""Functions for world models that read a categorical latent variable by variable."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


def embed_variables(module: nn.Module, z: Float[Array, "N V C"], width: int) -> Float[Array, "N V d"]:
    """Return a token per variable of z. Each variable has its own embedding table, which also encodes its position.

    The tables become parameters of `module`; call this in its compact method.
    """
    init = nn.initializers.normal(width**-0.5)
    tables = module.param("embed_z", init, (z.shape[1], z.shape[2], width))
    return jnp.einsum("nvc,vcd->nvd", z, tables)


def variable_logits(module: nn.Module, x: Float[Array, "N V d"], classes: int) -> Float[Array, "N V C"]:
    """Compute the logits of each variable from its token. Each variable has its own matrix, because classes of different
    variables are unrelated. (With one shared matrix, costs with vanishing gradients, Hamming and Jensen-Shannon, drove all
    variables to one class, where they stayed.)
    """
    init = nn.initializers.lecun_normal(batch_axis=0)
    kernel = module.param("logits", init, (x.shape[1], x.shape[2], classes))
    bias = module.param("logits_bias", nn.initializers.zeros, (x.shape[1], classes))
    return jnp.einsum("nvd,vdc->nvc", x, kernel) + bias
