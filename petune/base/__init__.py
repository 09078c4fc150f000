"""Foundations: errors, configuration, files, text, the hub, processes. No torch at import."""
