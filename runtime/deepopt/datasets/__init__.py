"""From text, or a user's dataset, to batches by (step, micro-batch)."""
