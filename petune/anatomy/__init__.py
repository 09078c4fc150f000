"""Find the parts of any ViT by structure: one traced forward, never a class name."""

from petune.anatomy.find import find_sites

__all__ = ["find_sites"]
