"""From the user's arrays to a kernel: arrays, scales, memory, dispatch."""
