class PackError(ValueError):
    """A packed file that can't be read: cut short, altered, of another kind or version, or not consistent."""
