"""The job service over HTTP: who may do what, the routes, event streams, and what operators watch. Imports no torch."""
