"""Products of matrices in bfloat16, whose gradient is fast on a CPU too.

Some processors have units for such products (AMX: five times the rate of float32), and XLA uses them, but not for a matrix that
is read across the order in which it lies in memory, as both matrices of a product are in its gradient: that one is computed in
float32. So there the gradient copies them first.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def product(x: Float[Array, "*b d"], kernel: Float[Array, "d k"]) -> Float[Array, "*b k"]:
    """x @ kernel, in their type, as the platform does it best."""
    if kernel.dtype != jnp.bfloat16:
        return x @ kernel
    return lax.platform_dependent(x, kernel, cpu=cpu_product, default=jnp.matmul)


def transposed(a: Float[Array, "m n"]) -> Float[Array, "n m"]:
    """a.T, as a copy: by a detour over three axes, or XLA would have the product that follows read `a` across.

    With an odd number of columns it is a.T, and maybe no copy.
    """
    m, n = a.shape
    return a.T if n % 2 else a.reshape(m, n // 2, 2).transpose(1, 2, 0).reshape(n, m)


@jax.custom_vjp
def cpu_product(x: Float[Array, "*b d"], kernel: Float[Array, "d k"]) -> Float[Array, "*b k"]:
    """x @ kernel with a gradient that is fast on a CPU in bfloat16."""
    return x @ kernel


def _backward(residuals, g):
    x, kernel = residuals
    rows, rows_g = (a.reshape(-1, width) for a, width in zip((x, g), kernel.shape, strict=True))
    return g @ transposed(kernel), transposed(rows) @ rows_g


cpu_product.defvjp(lambda x, kernel: (cpu_product(x, kernel), (x, kernel)), _backward)
