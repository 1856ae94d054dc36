"""A run folder made readable: tables for a console, pictures, and one page of HTML."""
