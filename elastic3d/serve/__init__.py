"""What other programs and people reach over the network: a queue in front of one model, and an HTTP API."""
