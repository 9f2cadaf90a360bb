"""Models of the recipes that MMDetection lacks; importing needs mmdet."""
