"""Serving engines. They run only as subprocesses in their own interpreter: plain data in, one JSON object on stdout."""
