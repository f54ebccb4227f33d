"""Shapes are checked in every test: jaxtyping's import hook wraps all functions of the helper packages."""

from jaxtyping import install_import_hook

UTILS = ("distributions", "guarantees", "losses", "monitor", "neighbourhood", "tabular", "world_model")
install_import_hook(["envs", "networks", *(f"utils.{name}" for name in UTILS)], "beartype.beartype")
