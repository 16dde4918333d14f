"""A server with the chat route of OpenAI: `mfrsvlm serve MODEL`."""
