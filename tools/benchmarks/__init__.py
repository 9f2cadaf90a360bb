"""What AGVM and optimizers cost, and how well phi is estimated."""
