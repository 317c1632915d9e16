"""Process groups, layout arithmetic, the pipeline schedule and reductions."""
