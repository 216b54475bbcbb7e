"""From bytes on disk to a `Batch` on the device. Imports nothing of `service`."""
