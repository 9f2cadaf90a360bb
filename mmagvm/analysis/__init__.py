"""What runs logged: read, summarized, drawn."""
