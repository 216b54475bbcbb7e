"""Starting jobs somewhere. Imports no torch."""
