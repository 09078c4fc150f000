"""What all tests share."""

# PEFT's BOFT imports setuptools, which fails once anything (transformers, triton) has imported Python's own distutils.
import setuptools  # noqa: F401
