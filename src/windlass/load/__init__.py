"""A client that loads a server and measures its answers. Knows no engine: any OpenAI server."""
