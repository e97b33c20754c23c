"""Fast operations on packed weights; only this part knows CUDA."""
