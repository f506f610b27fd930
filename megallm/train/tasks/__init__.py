"""What is trained: a task names its model, its data and its loss."""
