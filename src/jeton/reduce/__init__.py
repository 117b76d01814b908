"""Visual token reduction: one file per system, named by its id."""
