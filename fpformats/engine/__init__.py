"""Between what users pass in and the kernels: arrays, scales, memory, and the way to a kernel."""
