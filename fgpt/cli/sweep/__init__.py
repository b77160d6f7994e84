"""`fgpt sweep`: many trainings of one recipe, as one program over one base."""
