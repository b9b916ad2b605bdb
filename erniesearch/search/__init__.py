"""Search over a finished run: for programs, over HTTP, and on a page."""
