"""Matrix products in bfloat16 with a gradient that is fast on a CPU too.

Some CPUs have units for these products (AMX: five times the rate of float32). XLA uses them only if it reads both matrices in
memory order. In the gradient of a product, x and the kernel are read transposed, so XLA would compute it in float32. On a CPU,
the gradient here copies the transposed matrices first.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def product(x: Float[Array, "*b d"], kernel: Float[Array, "d k"]) -> Float[Array, "*b k"]:
    """Compute x @ kernel in their type, the fastest way on each platform."""
    if kernel.dtype != jnp.bfloat16:
        return x @ kernel
    return lax.platform_dependent(x, kernel, cpu=cpu_product, default=jnp.matmul)


def transposed(a: Float[Array, "m n"]) -> Float[Array, "n m"]:
    """Return a.T, as a copy if `a` has an even number of columns. A detour over three axes keeps XLA from reading `a`
    transposed in the product that follows.
    """
    m, n = a.shape
    return a.T if n % 2 else a.reshape(m, n // 2, 2).transpose(1, 2, 0).reshape(n, m)


@jax.custom_vjp
def cpu_product(x: Float[Array, "*b d"], kernel: Float[Array, "d k"]) -> Float[Array, "*b k"]:
    """Compute x @ kernel with a gradient that is fast on a CPU in bfloat16."""
    return x @ kernel


def _backward(residuals, g):
    x, kernel = residuals
    rows, rows_g = (a.reshape(-1, width) for a, width in zip((x, g), kernel.shape, strict=True))
    return g @ transposed(kernel), transposed(rows) @ rows_g


cpu_product.defvjp(lambda x, kernel: (cpu_product(x, kernel), (x, kernel)), _backward)
