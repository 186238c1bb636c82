"""Import and export of checkpoints that other code has published."""
