"""The built-in tuners: they come in through the same entry points as everybody's, written against `petune` only."""
