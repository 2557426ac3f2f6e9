"""``python -m serve.bench``: the benchmark of this engine, or of any server with OpenAI's API."""
