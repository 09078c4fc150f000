"""For authors of plugins: the contract as a check, a scaffold, a pytest plugin, tiny models."""
