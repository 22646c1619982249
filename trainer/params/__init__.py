"""Every parameter exists once, as a dataclass field; JSON, flags, widgets and the reference page are views of it."""
