"""Teachers that lag behind the student, have ranks of their own, or stand behind servers."""
