"""The server: OpenAI's protocol over HTTP for packages, on `vlpack.Engine`, and a page to talk to them.

It needs the extra ``serve``.
"""
