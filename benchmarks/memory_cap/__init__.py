"""Training a Llama under a hard cap on memory."""
