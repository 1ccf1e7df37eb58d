"""What a learning rate does to a run, as a page for people who do not know the theory."""
