"""What world models that read a code variable by variable share."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


def embed_variables(module: nn.Module, z: Float[Array, "N V C"], width: int) -> Float[Array, "N V d"]:
    """A token for each variable of z: its class, embedded by a table of the variable's own, which tells its place as well.

    The tables become parameters of `module`, in whose compact method this is called.
    """
    init = nn.initializers.normal(width**-0.5)
    tables = module.param("embed_z", init, (z.shape[1], z.shape[2], width))
    return jnp.einsum("nvc,vcd->nvd", z, tables)


def variable_logits(module: nn.Module, x: Float[Array, "N V d"], classes: int) -> Float[Array, "N V C"]:
    """Logits of each variable, read off its token by a matrix of the variable's own, for a class of one variable has nothing to
    do with the same class of another. (Sharing one matrix, costs with vanishing gradients, Hamming's and Jensen-Shannon's, were
    seen to drive all variables to one class and to stay there.)
    """
    init = nn.initializers.lecun_normal(batch_axis=0)
    kernel = module.param("logits", init, (x.shape[1], x.shape[2], classes))
    bias = module.param("logits_bias", nn.initializers.zeros, (x.shape[1], classes))
    return jnp.einsum("nvd,vdc->nvc", x, kernel) + bias
