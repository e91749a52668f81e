"""Tiles chosen with evidence: on a GPU by timing what is right, without one by what the compiler says."""
