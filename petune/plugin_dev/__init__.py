"""For plugin authors: the contract as a check, a scaffold, a pytest plugin, tiny models."""
