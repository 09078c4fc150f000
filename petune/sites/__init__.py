"""Find the parts of any ViT by structure: one traced forward, never a class name."""
