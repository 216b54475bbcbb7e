"""What a job looks like as Kubernetes objects: pure functions from an order and the settings. Imports no torch."""

from service.jobs.manifests.rendering import PLACEHOLDER, Format, documents, text

__all__ = ["PLACEHOLDER", "Format", "documents", "text"]
