"""vLLM servers that run already, used over HTTP."""
