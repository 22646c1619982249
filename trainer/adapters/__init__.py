"""Adapters: one file per type; choosing layers, attaching, strength, saving and export are written once."""
