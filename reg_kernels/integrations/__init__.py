"""What fits into other packages, each in a module of its own, which imports that package."""
