"""The pytest plugin: the only importer of pytest."""
