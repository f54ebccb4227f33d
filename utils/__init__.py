"""What is the same in every script and the point of none: losses, distributions, run flags, logging, scores."""
