"""What fits the library to others: methods by name, and mixins for frameworks, which nothing else here imports."""
