"""The built-in datasets: one reader each, registered as entry points, as those of plugins are."""
