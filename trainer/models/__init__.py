"""Base models: load them from a file or folder, encode text, name their layers."""
