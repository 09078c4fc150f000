"""The hooks that the verbs of `Edit` install."""
