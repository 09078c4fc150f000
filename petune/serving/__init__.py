"""Use what was trained: predict, evaluate, export, share, demo, many adapters on one backbone."""
