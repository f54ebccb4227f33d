"""Environments: the protocol that the scripts use, and its implementations."""
