"""Which samples a step reads, and how they get to the process that needs them."""
