"""The objective inside other people's trainers."""
