"""The built-in tuners: registered through the same entry points as plugins, and written against `petune` alone."""
