"""Detectors small enough to train in seconds: their part of a configuration."""

RETINANET = "model: {options: {fpn_channels: 16, anchor_sizes: [8, 16, 32, 64, 128]}}\n"
SOLOV2 = """
model:
  options:
    {fpn_channels: 16, head_channels: 32, head_convs: 1, mask_channels: 32, kernel_channels: 16, grids: [8, 6, 4, 3, 2]}
"""
