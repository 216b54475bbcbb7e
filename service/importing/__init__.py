"""Weights that others have trained, registered as models of ours."""
