"""What a config and a cluster tell of a training to come."""
