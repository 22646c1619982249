"""The programs Atelier lives in: the only files that import a WebUI's own modules."""
