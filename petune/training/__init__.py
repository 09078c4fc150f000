"""Training: the loop, its options, optimizer and schedule, evaluation, precision, checkpoints."""
