"""`lorot plan`: what a run would take on machines that are not here, from arithmetic whose assumptions are printed."""
