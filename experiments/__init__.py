"""How the small model was made, what its ideas are worth, and what goes on inside it: one command each."""
