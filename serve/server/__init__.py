"""The HTTP side of a server with OpenAI's API: what ``serve.api`` starts."""
