"""A name becomes a model with its weights."""
