"""Every parameter exists once, as a dataclass field; JSON, command line, widgets and the reference page are views of it."""
