"""What the `lorot data` commands do: prepare, verify, count and show."""
