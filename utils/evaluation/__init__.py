"""Evaluate trained policies: scores of whole games, and videos."""
