"""The adapter directory as tensors and text: what can be read, written and computed without a tuner."""
