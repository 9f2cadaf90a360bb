"""Models of the papers that the host lacks."""
