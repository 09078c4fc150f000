"""The benchmark runner: everything that fills a run directory, and tables of it."""
