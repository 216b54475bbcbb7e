"""Training: torchrun starts `worker`, which runs `loop` over an `engine`."""
