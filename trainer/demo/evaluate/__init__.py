"""Measured claims about modes and adapters on the painted world: scenarios, runs that are never repeated, tables."""
