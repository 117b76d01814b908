"""Visual token reduction without training: one file per system, named by its id."""
