"""A host library of the tests: the Model part alone."""
