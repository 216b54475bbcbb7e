"""What an operator does with the job service: back it up, restore it, clear up after it. Imports no torch."""
