"""A run in other people's pages (TensorBoard, Weights & Biases, trackio), from processes that cannot touch it."""
