"""Playing with what was trained: scores of whole games, and videos."""
