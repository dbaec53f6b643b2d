"""What is trained. A task has examples, a loss, reports, and the models that belong to it alone."""
