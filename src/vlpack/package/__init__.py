"""Reads packages: manifest, runtime configuration, description, and checks that a package uses only its own files."""
