"""A study: many runs, launched and compared."""
