"""Clips of videos: which frames are read, decoding, the cache of frames."""
