"""Whole runs of the engine on a graphics card that is not there; see README.md beside this file."""
