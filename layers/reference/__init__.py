"""The equations, executable: slow loops that define what is right."""
