"""Training modes: one file is one mode, and a mode is a loss."""
