"""The safe-improvement bound: its formulas, its terms for tables, and a monitor that measures them while a script trains."""
