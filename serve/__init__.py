"""Serving: the engine with its host and device sides, the server, and the programs that load either."""
