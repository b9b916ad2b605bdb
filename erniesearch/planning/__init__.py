"""What a training will need before it is started: memory, traffic and time per rank."""
