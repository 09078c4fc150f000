"""The survey: every method on every family, each pair proven right or refused with a reason."""
