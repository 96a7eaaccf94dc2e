"""The cache of packages that are built by name: where it is, what is in it, and how packages get in and out.

``place.py`` says where the cache is, ``packages.py`` finds packages in it, and ``changes.py`` adds and removes them.
Nothing here imports what builds packages.
"""
