"""Data loaders side by side, on one machine and in one run: `make bench-data`. README.md says what the figures mean."""
