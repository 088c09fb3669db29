"""Driver: from a model to a verified artifact."""
