"""`lorot profile`: what a job's speed is limited by, found by running its loader and its step apart and together."""
