"""The safe-policy-improvement bound: formulas, exact terms for tabular problems, and a monitor for training runs."""
