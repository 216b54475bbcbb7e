"""Pictures made of numbers: the drawn objects, backgrounds and scenes of the `demo` data set.

The same seed gives the same bytes on every machine. So only operations that IEEE 754 rounds correctly are used (+, -,
*, /, sqrt, one at a time on arrays), sums run over integers, and sines are taken by `math` and rounded to six decimals.
"""
