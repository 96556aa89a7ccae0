"""What owns parameters, gradients and the optimizer of a run: plain, fsdp, deepspeed."""
