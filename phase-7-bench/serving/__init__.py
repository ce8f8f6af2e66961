"""An OpenAI-compatible server over the engine of many requests, and a client for any such server."""
