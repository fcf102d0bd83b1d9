"""Studies: which recipes a paper's questions need, and what their results answer. Nothing here runs a model."""
