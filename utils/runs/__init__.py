"""Training runs, independent of the algorithm: flags, startup, logs, scores, memory."""
