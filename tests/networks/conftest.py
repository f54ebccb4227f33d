"""Of the tests of networks."""

import jax
import pytest


@pytest.fixture(autouse=True)
def full_precision():
    """A GPU rounds the factors of its products, by default, and differently in different algorithms."""
    with jax.default_matmul_precision("highest"):
        yield
