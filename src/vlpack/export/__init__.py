"""Writes packages: graphs, data files, settings, manifest and README."""
