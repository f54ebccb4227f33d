"""Environments: the protocol that scripts are written against, and what satisfies it."""
