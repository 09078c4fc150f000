"""Rows of images and targets, from files of several kinds, made into a dataset by one piece of code."""
