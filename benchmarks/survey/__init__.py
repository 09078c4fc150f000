"""The survey: every method on every family of backbones; each pair is verified, or refused with a reason."""
