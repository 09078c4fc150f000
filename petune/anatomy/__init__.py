"""Find the parts of any ViT by structure: one traced forward, never a class name."""

from petune.anatomy.find import find_sites
from petune.anatomy.geometry import input_sizes_of

__all__ = ["find_sites", "input_sizes_of"]
