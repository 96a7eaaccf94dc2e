"""The command line: parses options, calls the library and prints results. It makes no decisions of its own."""
