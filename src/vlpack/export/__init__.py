"""Writes a package: graphs, data files, settings, manifest and cards."""
