"""A study: launch and compare many runs."""
