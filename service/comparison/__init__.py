"""`lorot compare`: several registered models, several jobs, one table and one set of figures. Imports no torch."""
