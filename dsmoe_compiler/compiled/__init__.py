"""What was compiled before, per user: a model that is the same in all but its weights' values is not compiled twice."""
