"""A run, whatever its algorithm: flags, start, logs, scores, memory."""
