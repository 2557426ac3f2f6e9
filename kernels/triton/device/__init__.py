"""Device code, in Triton's language: Python that is compiled and never run, so type checkers leave it alone."""
