"""Plans a training from its config and the cluster."""
