"""An HTTP server for packages: OpenAI's protocol on top of `vlpack.Engine`, and a web page for conversations.

It needs the extra ``serve``.
"""
