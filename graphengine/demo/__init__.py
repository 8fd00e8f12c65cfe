"""What does graphengine run when no model is at hand? A tiny checkpoint that adds numbers."""
