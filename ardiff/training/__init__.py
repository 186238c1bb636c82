"""Training: the DeepSpeed engine, the loop, exact checkpoints."""
