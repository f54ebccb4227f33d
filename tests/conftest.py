"""Shapes are checked in every test: jaxtyping's import hook wraps all functions of the helper packages."""

from jaxtyping import install_import_hook

install_import_hook(["envs", "networks", "utils.losses", "utils.distributions", "utils.world_model"], "beartype.beartype")
